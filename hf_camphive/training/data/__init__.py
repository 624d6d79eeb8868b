"""Datasets: opened, divided into disjoint roles, and served in batches.

`datasets.py` opens, `splits.py` divides, `loaders.py` serves, `calibration.py` holds the calibration images in memory.
"""
