"""One file per command of `camphive`: a function named after it, and the dataclasses of its own options.

Imports that take seconds stand inside the functions, so that `--help` and mistakes in spelling are answered at once.
"""
