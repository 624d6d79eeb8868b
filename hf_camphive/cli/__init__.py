"""The command line; the only room that prints.

May import every room. Start with `main.py`.
"""
