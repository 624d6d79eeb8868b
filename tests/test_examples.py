"""The examples run as they stand, offline."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.brief import time_briefly
from support.tiers import slow_ones

EXAMPLES = Path(__file__).parent.parent / "examples"
SAYS = {  # example: something that only its last step prints
    "prune_and_reload": "All three readers give the same digits",
    "plan_only": "Channels that only one of the two plans keeps",
    "curvature_alone": "Trace: ",
    "my_own_criterion": "MACs per image",
    "latency_budget": "times faster",
}


def test_every_example_is_run():
    scripts = {path.stem for path in EXAMPLES.iterdir()} - {"__pycache__"}
    assert scripts == {*SAYS, "several_processes"}


@pytest.mark.usefixtures("registrations")
@pytest.mark.parametrize("name", slow_ones(SAYS, {"latency_budget", "my_own_criterion"}))
def test_an_example_runs_to_its_end(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name != "latency_budget":  # its point is what is timed
        time_briefly(monkeypatch)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


@pytest.mark.slow
def test_several_processes_make_the_plan_of_one(tmp_path):
    folder = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run = subprocess.run(
        ["sh", str(EXAMPLES / "several_processes.sh")],
        cwd=tmp_path,
        env=os.environ | {"PATH": folder},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "One process and two make the same plan." in run.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*")), ids=lambda path: path.name)
def test_an_example_is_a_page_long_at_most(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
