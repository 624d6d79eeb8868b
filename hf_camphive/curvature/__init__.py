"""Curvature of the loss, computed from matrix-vector products; usable without the other rooms.

Provides Hessian and Gauss-Newton matrices over weights or channel gates, their eigenpairs and traces. May import `core`
and `network`. Start with `operators.py`.
"""
