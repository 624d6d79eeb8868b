"""Whole runs: prune a network in cycles, resume an interrupted run, compare methods.

May import every room but `cli`. Start with `pruner.py` (one run) and `cycle.py` (its steps).
"""
