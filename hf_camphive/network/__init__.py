"""A network's structure, and how it is changed.

Traces a network, finds which channels live or die together, cuts them out, and proves the result. May import `core`.
Start with `graph/tracing.py` (channel groups) and `surgery/cutting.py` (the one place where a weight is sliced).
"""
