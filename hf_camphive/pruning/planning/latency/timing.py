"""Timings of operations and networks, measured in turns; those of operations are kept on disk for later runs."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from filelock import FileLock
from huggingface_hub import constants

from hf_camphive.core.runtime import ALONE, Workers, environment

logger = logging.getLogger(__name__)
SCHEMA = 3
CALLS, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 4, 5, 40, 30  # many rounds, because the machine's speed drifts
CHUNK = 512  # entries that are timed in turns and then written to disk together
LOCK_SECONDS = 60.0  # longest wait for other processes to write, which takes them milliseconds

Prepare = Callable[[], Callable[[], object]]
"""Allocates inputs and returns the function to be timed."""
Timer = Callable[[Mapping[str, Prepare], torch.device, Workers], dict[str, float]]


class LatencyTable:
    """Hold milliseconds by key, and keep those of operations in `folder` (by default `$HF_HOME/camphive`).

    There is one file for each combination of device, vector instructions, number of threads and version of torch. A file
    that cannot be read is replaced, with a warning.
    """

    def __init__(self, device: torch.device | str = "cpu", folder: Path | None = None, timer: Timer | None = None):
        self.device, self.timer = torch.device(device), timer or typical_times
        about = environment(self.device)
        self.about = {key: about[key] for key in ("device", "threads", "torch")}
        self.about["instructions"] = torch.backends.cpu.get_cpu_capability()  # other CPUs may bear the same name
        digest = hashlib.sha256(json.dumps(self.about).encode()).hexdigest()[:16]
        self.path = (folder or Path(constants.HF_HOME, "camphive")) / f"latency-{digest}.json"
        self.ms = self._load()
        self._yardstick: tuple[str, Prepare] | None = None

    def measure(self, works: Mapping[str, Prepare], workers: Workers = ALONE) -> None:
        """Time the works whose keys are not in the table, and write them to disk."""
        missing = [key for key in works if key not in self.ms]
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            found = self.timer({key: works[key] for key in chunk}, self.device, workers)
            self.ms |= found
            self._save(found)

    def measure_networks(self, works: Mapping[str, Prepare], workers: Workers = ALONE) -> None:
        """Time whole networks, for this object only: in another run the machine may be faster or slower.

        The first network ever given is timed again with all later ones. Their times are multiplied by the ratio of its
        first to its present time, so that all are in the milliseconds of the first call, like the budgets.
        """
        missing = {key: work for key, work in works.items() if key not in self.ms}
        if not missing:
            return
        self._yardstick = self._yardstick or next(iter(missing.items()))
        found = self.timer(dict([self._yardstick]) | missing, self.device, workers)
        now = found[self._yardstick[0]]
        pace = self.ms.get(self._yardstick[0], now) / now
        self.ms |= {key: pace * ms for key, ms in found.items()}

    def _load(self) -> dict[str, float]:
        """Return the entries of the file, none if it is absent, damaged or of another schema."""
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if values["schema"] == SCHEMA:
                return {str(key): float(ms) for key, ms in values["ms"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("The latency table in %s is damaged (%s) and is measured again", self.path, error)
        return {}

    def _save(self, found: Mapping[str, float]) -> None:
        """Add entries to the file, atomically; a lock preserves entries that other processes add at the same time.

        Logs a warning if the file or the lock is not available.
        """
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_suffix(".lock"), timeout=LOCK_SECONDS):
                text = json.dumps({"schema": SCHEMA, "about": self.about, "ms": self._load() | dict(found)}, indent=0)
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, self.path)
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            logger.warning("The latency table could not be kept in %s: %s", self.path, error)


def typical_times(works: Mapping[str, Prepare], device: torch.device, workers: Workers = ALONE) -> dict[str, float]:
    """Return each work's median milliseconds over rounds in which all take turns, so that other load slows all alike.

    Minimum times would favour narrow networks, since a short work has more chances of an undisturbed moment.
    """
    times: dict[str, list[float]] = {key: [] for key in works}

    def take_turns() -> None:
        """Time every work once, after one untimed call."""
        for key, prepare in works.items():
            run = prepare()
            _milliseconds(run, device)
            times[key] += [_milliseconds(run, device) for _ in range(CALLS)]
            bar.update()

    began = time.perf_counter()
    with torch.no_grad(), workers.bar("Time layers", "run", MIN_ROUNDS * len(works)) as bar:
        take_turns()
        rounds = min(max(MIN_ROUNDS, int(SECONDS / (time.perf_counter() - began))), MAX_ROUNDS)
        bar.total = rounds * len(works)
        for _ in range(rounds - 1):
            take_turns()
    return {key: median(found) for key, found in times.items()}


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call; on an accelerator the mean of ten in a row, since calls overlap there."""
    calls = 1 if device.type == "cpu" else 10
    if calls > 1:
        torch.accelerator.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if calls > 1:
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - began) / calls
