"""Tests run offline, on the CPU, and without the progress bars of the libraries."""

import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Processes that tests start import this checkout, and `support` as the tests do.
os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])


@pytest.fixture
def accelerator():
    """An `Accelerator` of one process that leaves nothing behind for the next test."""
    from accelerate.state import AcceleratorState, GradientState
    from support.training import fresh_accelerator

    yield fresh_accelerator()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def registrations():
    """What a test registers (criteria, merge rules, handlers of operations) is gone after it."""
    from hf_camphive.core import methods
    from hf_camphive.network.graph import handlers
    from hf_camphive.pruning.merging import rules
    from hf_camphive.pruning.scoring import criteria

    tables = (methods.CRITERIA, methods.MERGE_RULES, criteria.SCORERS, rules.MERGERS, handlers.HANDLERS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before):
        table.clear()
        table.update(rows)
