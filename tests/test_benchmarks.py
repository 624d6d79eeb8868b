"""The benchmark of curvature runs from end to end, agrees with its peers and writes what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quick_benchmark_of_curvature_agrees_with_its_peers_and_keeps_its_figures(tmp_path):
    for peer in ("pyhessian", "curvlinops", "torch_pruning"):
        pytest.importorskip(peer)
    command = [sys.executable, "benchmarks/curvature.py", "--quick", "--only", "product", "block"]
    run = subprocess.run(
        [*command, "--results", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    sections = json.loads((tmp_path / "curvature.json").read_text())
    assert set(sections) == {"product", "block"}
    differences = {
        figure["name"]: figure["median"]
        for figure in sections["product"]["figures"]
        if "difference from ours" in figure["name"] or "against fp64" in figure["name"]
    }
    assert len(differences) == 5 and max(differences.values()) < 1e-4, differences
    assert "random images" in run.stdout and "PyHessian Hessian / gate Hessian" in run.stdout
    assert (tmp_path / "curvature.png").stat().st_size > 10_000
