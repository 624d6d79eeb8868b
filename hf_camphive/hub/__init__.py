"""What comes from the Hub or a folder, and what goes there.

Loads base networks and pruned ones, saves, pushes, writes report, card and plots. May import `core`, `network`, `training`
and `curvature`, never `pruning`. Start with `loading.py` and `saving.py`.
"""
