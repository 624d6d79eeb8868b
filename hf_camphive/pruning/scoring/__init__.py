"""Scores of channels: one function per criterion, and what they may look at.

`context.py` holds what a criterion is given, `criteria.py` the table of criteria.
"""
