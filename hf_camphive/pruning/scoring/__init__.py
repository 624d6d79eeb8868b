"""Scores of channels: one function per criterion, and the inputs that all of them share.

`context.py` defines the argument of a criterion, `criteria.py` the table of criteria.
"""
