"""Change the structure of a network: cutting, folding, widening, and the experiments that verify the coupling of channels.

Each change keeps the function that it should keep, and checks that. Start with `cutting.py` (`apply_plan`) and
`verification.py` (`check_groups`). May import `core` and the rest of `network`.
"""
