"""Plain data and this process: what every room shares.

Settings, plans, measured figures, errors, and the process's accelerator. Imports nothing else of the package. Start with
`config.py` (every choice of a run) and `plan.py` (a plan is a value).
"""
