"""The pruning method: score channels, plan which to remove, merge the removed into the kept, polish.

May import `core`, `network`, `training` and `curvature`. Start with `scoring/criteria.py`, `planning/greedy.py` and
`merging/rules.py`; `tuning.py` lists the numbers that change results.
"""
