"""Predicted milliseconds of a network at any widths, from timings of its operations.

`operations.py` lists the operations that take time, `timing.py` times them and keeps a table, `prediction.py`
interpolates.
"""
