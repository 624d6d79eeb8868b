"""Models from the Hub or a folder, and model folders to save and push.

Loads networks to prune and pruned models, writes model folders with report, card and plots, and pushes them. May import
`core`, `network`, `training` and `curvature`, never `pruning`. Start with `loading.py` and `saving.py`.
"""
