"""Which forms of a test run by default, and which in the slow tier (`make test-slow`)."""

from collections.abc import Sequence

import pytest


def first_by_default(forms: Sequence, quick: int = 1) -> list:
    """Parameters of a test, of which the first `quick` run by default, and the others in the slow tier."""
    slow = [
        pytest.param(*(form if isinstance(form, tuple) else (form,)), marks=pytest.mark.slow) for form in forms[quick:]
    ]
    return [*forms[:quick], *slow]
