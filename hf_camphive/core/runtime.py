"""This process and the others of its launch: `Workers`, the `Accelerator`, versions and hardware, memory allocation."""

import ctypes
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm import tqdm

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import CampHiVeError, ConfigError

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


def make_accelerator(config: CampHiVeConfig) -> Accelerator:
    """Return the `Accelerator` of this process.

    Raises:
        ConfigError: The process was launched for something that would silently be done otherwise.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise ConfigError(
                f"accelerate launched with {name}: it shards parameters, and curvature needs second derivatives of "
                "whole ones; the networks fit on one device, so launch with --multi_gpu instead"
            )
    has_gpu = torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and not has_gpu:
        raise ConfigError("mixed_precision is 'fp16', which needs a GPU; use auto, bf16 or no")
    try:
        accelerator = Accelerator(
            cpu=not has_gpu,
            mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
    except ValueError as error:
        raise ConfigError(f"accelerate cannot start as it was launched: {error}") from error
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise ConfigError(
            f"launched as one of {asked} processes, but they do not see each other ({accelerator.num_processes} in "
            "the group): every one would do the whole run; set ACCELERATE_USE_CPU=true on CPU, or launch one process"
        )
    if accelerator.num_processes > 1 and float64_device(accelerator.device) != accelerator.device:
        raise ConfigError(
            f"{accelerator.num_processes} processes on {accelerator.device}, which has no float64: sums over processes are taken "
            "in it, on that device; launch one process, or several on CPU with ACCELERATE_USE_CPU=true"
        )
    if "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        logger.warning(
            "Several processes were asked for, but accelerate started one: it ignores --num_processes on CPU. "
            "To have them, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N."
        )
    return accelerator


class Workers:
    """The processes of one launch, as the code that runs on each of them sees them.

    Sums and broadcasts over all processes, and progress bars that one process per machine shows. Without an accelerator:
    this process alone, on the CPU. `shows` switches the bars on or off; by default they are on with an accelerator.
    """

    def __init__(self, accelerator: Accelerator | None = None, shows: bool | None = None) -> None:
        self._accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index
        self.device = torch.device("cpu") if accelerator is None else accelerator.device
        self.is_main = self.index == 0
        self.shows = (accelerator is not None and accelerator.is_local_main_process) if shows is None else shows

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes, on the tensor's own device."""
        if self._accelerator is None or self.count == 1:
            return tensor
        return self._accelerator.reduce(tensor.to(self.device), reduction="sum").to(tensor.device)

    def broadcast(self, value: Any) -> Any:
        """Return the main process's value on every process; what the others pass is ignored."""
        return value if self.count == 1 else broadcast_object_list([value])[0]

    def on_main(self, action: Callable[[], Item]) -> Item:
        """Run `action` on the main process alone, and return its result on every process; the others wait.

        What writes to a disk that the processes share, and what is timed, goes through here. The result must be picklable.

        Raises:
            CampHiVeError: On every process, where `action` raises one on the main process.
        """
        if self.count == 1:
            return action()
        result, error = None, None
        if self.is_main:
            try:
                result = action()
            except CampHiVeError as raised:
                error = raised
        result, error = broadcast_object_list([result, error])
        if error is not None:
            raise error
        return result

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def bar(self, description: str, unit: str, total: int | None = None, done: int = 0) -> tqdm:
        """Return a progress bar, shown by one process per machine; `done` of `total` units are done already."""
        return tqdm(
            desc=description,
            unit=unit,
            total=total,
            initial=done,
            leave=False,
            dynamic_ncols=True,
            disable=not self.shows,
        )

    def track(self, items: Sequence[Item], description: str, unit: str) -> Iterator[Item]:
        """Yield the items while a progress bar counts them."""
        with self.bar(description, unit, len(items)) as bar:
            for item in items:
                yield item
                bar.update()


@dataclass
class RunLog:
    """What a reader should know of a run: wall-clock seconds by step, and notes in whole sentences."""

    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the time that passes inside to the step's seconds."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def note(self, text: str) -> None:
        """Add a note, and log it."""
        self.notes.append(text)
        logger.info(text)


ALONE = Workers()
"""This process alone, which shows no progress: what curvature and merging run on where nothing else is given."""


def environment(device: torch.device | str = "cpu", processes: int = 1) -> dict[str, str]:
    """Versions and hardware that a run's figures depend on."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    packages = {package: version(package) for package in ("torch", "timm", "transformers", "hf_camphive")}
    return {
        "python": platform.python_version(),
        **packages,
        "device": name if device.type in ("cpu", "cuda") else f"{device.type} of {name}",
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "processes": str(processes),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
KEPT, STEP = 2**30, 2**26  # bytes


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed, in place of giving it back to the system at once; whether that could be set.

    glibc maps each block above 32 MiB anew, so that every activation of a network is paid for by page faults, which cost
    more than many an operation on it. Elsewhere than under glibc nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_MMAP_THRESHOLD: KEPT, M_TRIM_THRESHOLD: KEPT, M_TOP_PAD: STEP}
    return all(mallopt(key, value) == 1 for key, value in settings.items())


_WORDS = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that a device had no memory left; PyTorch raises a plain `RuntimeError` on CPUs."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _WORDS)


@cache
def float64_device(device: torch.device) -> torch.device:
    """Return the device itself where it computes in float64, else the CPU.

    Raises:
        RuntimeError: The device is out of memory.
    """  # noqa: DOC501 (TypeError is caught)
    try:
        torch.ones(2, dtype=torch.float64, device=device).sum().item()
    except (RuntimeError, TypeError) as error:  # which of them depends on the backend
        if is_out_of_memory(error):
            raise
        return torch.device("cpu")
    return device


def to_float64(tensor: Tensor) -> Tensor:
    """Return the tensor in float64, on the `float64_device` of its own device."""
    return tensor.to(float64_device(tensor.device)).double()
