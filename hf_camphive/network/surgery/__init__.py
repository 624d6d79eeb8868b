"""Changes to a network that keep its function: cutting, folding, widening, and the experiments that prove them.

Start with `cutting.py` (`apply_plan`) and `verification.py` (`check_groups`). May import `core` and the rest of `network`.
"""
