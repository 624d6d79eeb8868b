"""Whole runs without the seconds that only a user's report is worth."""

from functools import partial

import pytest

from hf_camphive.network import footprint
from hf_camphive.runs import pruner

measure_briefly = partial(footprint.measure_latency, runs=2, seconds=0.02)


def time_briefly(patch: pytest.MonkeyPatch) -> None:
    """A few runs of each network are timed, not a hundred."""
    for module in (pruner, footprint):
        patch.setattr(module, "measure_latency", measure_briefly)
