"""On several processes only the main one touches model folders; the others wait for what it finds, errors included."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from hf_camphive.cli import main as cli
from hf_camphive.core import runtime as launch
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import OutputError
from hf_camphive.hub import saving as hub
from hf_camphive.hub.loading import load_base
from hf_camphive.runs import progress as resume
from hf_camphive.runs import pruner
from hf_camphive.runs.pruner import CampHiVePruner

CONFIG = CampHiVeConfig(target_macs=0.5)
IDENTITY = {"weights": "0123"}
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def member(rank: int, port: int, act: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()}, MASTER_ADDR="localhost")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    act(accelerator, *arguments)
    accelerator.end_training()


def in_two_processes(act: Callable[..., None], *arguments: Any) -> None:
    """Run `act(accelerator, *arguments)` in two forked processes that see each other; an error in one is raised."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    both = torch.multiprocessing.start_processes(
        member, (port, act, arguments), nprocs=2, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 60
    while not both.join(timeout=1):
        if time.monotonic() > deadline:
            for process in both.processes:
                process.kill()
            pytest.fail("a process waits for ever")


def recorded(folder: Path, accelerator: Accelerator) -> Callable[..., Path]:
    """`check_output_folder`, which leaves a file named after each process that calls it."""
    real = hub.check_output_folder

    def check(*args: Any, **kwargs: Any) -> Path:
        (folder / f"checked by {accelerator.process_index}").touch()
        return real(*args, **kwargs)

    return check


def saving(accelerator: Accelerator, mine: Path, free: Path) -> None:
    job = CampHiVePruner(load_base("digits_resnet"), CONFIG, accelerator)
    job.report = job._report(None, "", latency=False)
    pruner.draw_plots = lambda *args: None
    with pytest.raises(OutputError, match=r"thesis\.tex"):
        job.save_pretrained(mine, overwrite=True)
    assert job.save_pretrained(free) == free and (free / "model.safetensors").is_file()


@forks
def test_all_raise_what_the_main_process_meets_while_saving(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    in_two_processes(saving, tmp_path / "mine", tmp_path / "free")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine" and (tmp_path / "free" / "config.json").is_file()


def pushing(accelerator: Accelerator, folder: Path) -> None:
    job = CampHiVePruner(load_base("digits_resnet"), CONFIG, accelerator)
    job.report = job._report(None, "", latency=False)
    pruner.draw_plots = lambda *args: None
    pruner.saving.push_folder = pushed_by(accelerator, "https://huggingface.co/someone/small")
    assert job.push_to_hub("someone/small") == "https://huggingface.co/someone/small"
    pruner.saving.push_folder = pushed_by(accelerator, OutputError("not logged in"))
    with pytest.raises(OutputError, match="not logged in"):
        job.push_to_hub("someone/small")
    (folder / f"done by {accelerator.process_index}").touch()


def pushed_by(accelerator: Accelerator, outcome: str | Exception) -> Callable[..., str]:
    """`push_folder` with a given outcome, which only the main process may call."""

    def push(folder: Path, *args: Any, **kwargs: Any) -> str:
        assert accelerator.is_main_process and (folder / "model.safetensors").is_file()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return push


@forks
def test_all_learn_what_became_of_a_push(tmp_path):
    in_two_processes(pushing, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"done by 0", "done by 1"}


def resuming(accelerator: Accelerator, work: Path) -> None:
    job = CampHiVePruner(load_base("digits_resnet"), CONFIG, accelerator)
    hub.check_output_folder = recorded(work, accelerator)
    loaders = SimpleNamespace(info=SimpleNamespace(dataset_id="not given", label_names=job.base.label_names))
    job._identity = IDENTITY
    job._restore(work, loaders)
    assert job.log.seconds == {"prune": 1.5}


@forks
def test_only_the_main_process_puts_back_what_a_killed_run_left_aside(accelerator, tmp_path):
    job = CampHiVePruner(load_base("digits_resnet"), CONFIG, accelerator)
    report = replace(job._report(None, "", latency=False), seconds={"prune": 1.5})
    resume.save_progress(tmp_path, resume.Progress(job.net, None, (), report), job.base, CONFIG, IDENTITY)
    (tmp_path / "network").rename(tmp_path / ".network.old-0123abcd")
    in_two_processes(resuming, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"network", "run.json", "checked by 0"}


def test_the_command_line_checks_the_output_folder_on_the_main_process_only(monkeypatch, tmp_path):
    other = SimpleNamespace(
        num_processes=2, process_index=1, device="cpu", is_main_process=False, is_local_main_process=False
    )
    monkeypatch.setattr(launch, "make_accelerator", lambda config: other)
    monkeypatch.setattr(launch, "broadcast_object_list", lambda items: [None, OutputError("no room")])
    monkeypatch.setattr(hub, "check_output_folder", lambda *args: pytest.fail("checked by another process"))
    with pytest.raises(OutputError, match="no room"):
        cli.prune(["--output-dir", str(tmp_path / "x")])
