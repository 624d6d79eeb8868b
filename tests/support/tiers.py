"""Which forms of a test run by default, and which in the slow tier (`make test-slow`)."""

from collections.abc import Collection, Iterable

import pytest


def first_by_default(forms: Iterable, quick: int = 1) -> list:
    """Parameters of a test, of which the first `quick` run by default, and the others in the slow tier."""
    return [form if number < quick else _slow(form) for number, form in enumerate(forms)]


def slow_ones(forms: Iterable, slow: Collection) -> list:
    """Parameters of a test, of which those in `slow` run in the slow tier."""
    return [_slow(form) if form in slow else form for form in forms]


def _slow(form):
    return pytest.param(*(form if isinstance(form, tuple) else (form,)), marks=pytest.mark.slow)
