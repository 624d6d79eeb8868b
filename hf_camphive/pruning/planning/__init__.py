"""Plans: which channels to remove within budgets of MACs, parameters and milliseconds.

`costs.py` says what a network costs at given widths, `limits.py` what may be taken, `greedy.py` chooses, `budgets.py`
divides a budget over cycles, `latency/` predicts milliseconds.
"""
