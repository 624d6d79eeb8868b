"""How benchmarks measure: contestants that take turns, peak memory, and figures beside their targets."""

import multiprocessing
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

Seconds = dict[str, list[float]]  # of each contestant, in the order of the rounds
Contestants = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Figure:
    """A measured number, median and extremes over the rounds, beside what it should be."""

    subject: str
    name: str
    median: float
    low: float
    high: float
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the median keeps to the target; None without one."""
        if self.target is None:
            return None
        return self.median <= self.target if self.at_most else self.median >= self.target

    def to_dict(self) -> dict:
        """As JSON."""
        return asdict(self) | {"met": self.met}


def race(contestants: Contestants, rounds: int, device: str = "cpu") -> Seconds:
    """Wall time of each contestant in each round, after a warm-up.

    They take turns within a round, so that what disturbs the machine disturbs all of them; compare within a round.
    """
    seconds: Seconds = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            elapsed = seconds_of(run, device)
            if turn:
                seconds[name].append(elapsed)
    return seconds


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall time of one call."""
    _wait(device)
    began = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - began


def ratio(subject: str, seconds: Seconds, slow: str, fast: str, times: float = 1, **target) -> Figure:
    """`slow` / (`times` * `fast`), each from the same round."""
    label = f"{times:g} x {fast}" if times != 1 else fast
    return spread(
        subject, f"{slow} / {label}", [a / (times * b) for a, b in zip(seconds[slow], seconds[fast])], **target
    )


def spread(subject: str, name: str, values: list[float], **target) -> Figure:
    """Median and extremes of values as a figure."""
    return Figure(subject, name, median(values), min(values), max(values), **target)


def straightness(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope, intercept and R^2 of the line that fits best."""
    slope, intercept = np.polyfit(x, y, 1)
    rest = np.asarray(y) - slope * np.asarray(x) - intercept
    return float(slope), float(intercept), float(1 - rest.var() / np.var(y))


def peak_bytes(build: Callable[..., Callable[[int], object]], *arguments, device: str = "cpu") -> int:
    """Most memory that `build(*arguments)(None)` held beyond what stood before, in a process of its own.

    There it is called on one image first, so that libraries and their buffers are loaded, then on all.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes_here, (build, arguments, device, torch.get_num_threads()))


def _peak_bytes_here(build: Callable, arguments: tuple, device: str, threads: int) -> int:
    torch.set_num_threads(threads)
    run = build(*arguments)
    run(1)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(None)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again at what is resident
    before = resident_bytes("VmRSS")
    run(None)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (most so far) of this process."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def markdown(sections: Mapping[str, Mapping]) -> str:
    """Figures of all sections as a table, with the notes below."""
    lines = ["| section | subject | figure | median | min .. max | target | met |", "|---|---|---|---|---|---|---|"]
    for section, found in sections.items():
        for row in found["figures"]:
            target = "" if row["target"] is None else f"{'<=' if row['at_most'] else '>='} {row['target']:g}"
            met = {True: "yes", False: "**no**", None: ""}[row["met"]]
            lines.append(
                f"| {section} | {row['subject']} | {row['name']} | {row['median']:.3g} "
                f"| {row['low']:.3g} .. {row['high']:.3g} | {target} | {met} |"
            )
    notes = [f"- {section}: {note}" for section, found in sections.items() for note in found["notes"]]
    return "\n".join([*lines, "", *notes]) + "\n"
