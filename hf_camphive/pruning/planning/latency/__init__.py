"""Predicted milliseconds of a network at any widths, from timed operations.

`operations.py` lists what takes time, `timing.py` times it and keeps a table, `prediction.py` interpolates.
"""
