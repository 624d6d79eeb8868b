"""Curvature of the loss by products with vectors; usable alone.

Hessian and Gauss-Newton matrices over weights or channel gates, eigenpairs and traces. May import `core` and `network`.
Start with `operators.py`.
"""
