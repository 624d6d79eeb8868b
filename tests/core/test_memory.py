"""Memory that is freed stays with the process where that was asked for."""

import platform
import subprocess
import sys

import pytest

from hf_camphive.core import runtime

FAULTS = """
import resource, torch
from hf_camphive.core.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def fewest():
    faults(), faults()
    return min(faults() for _ in range(5))  # a small block may lie in the way once

usual = fewest()
assert keep_freed_memory()
print(usual, fewest())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
@pytest.mark.slow
def test_a_block_that_was_used_before_costs_no_page_faults():
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True)
    usual, kept = map(int, found.stdout.split())
    assert kept < 10 < usual  # huge pages: 32


def test_elsewhere_it_says_so(monkeypatch):
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    assert not runtime.keep_freed_memory()
