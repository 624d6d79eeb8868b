"""Merging: what the consumers of removed channels compute instead.

`rules.py` holds the table of merge rules, `reconstruction.py` the least-squares fit that is the default.
"""
