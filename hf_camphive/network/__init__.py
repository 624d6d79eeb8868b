"""Trace the structure of a network, and change it.

Finds which channels must be removed together, removes them, and checks that the result computes the intended function. May
import `core`. Start with `graph/tracing.py` (channel groups) and `surgery/cutting.py` (which slices weights).
"""
