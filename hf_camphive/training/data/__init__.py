"""Datasets: opened, divided into disjoint roles, and served in batches.

May import `core` and `network`. `loaders.py` is the entry: it opens a dataset (`datasets.py`), divides its rows among roles
(`splits.py`) and makes loaders; `calibration.py` holds the calibration images in memory.
"""
