"""Plans: which channels to remove to meet budgets of MACs, parameters and milliseconds.

`costs.py` computes a network's costs at given widths, `limits.py` the fewest channels of each group, `greedy.py` chooses
the channels to remove, `budgets.py` divides budgets over cycles, `latency/` predicts milliseconds.
"""
