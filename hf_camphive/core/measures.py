"""What is measured of a network, as plain data: accuracy, cost and latency, and how figures are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Accuracy:
    """Shares of images whose label is the best guess (top1) or among the five best (top5), in [0, 1]."""

    top1: float
    top5: float
    images: int
    split: str

    @property
    def standard_error(self) -> float:
        """Of top1, sqrt(p (1 - p) / N); where no image, or every one, is right, that of half an image: none is certain."""
        p = min(max(self.top1, 0.5 / self.images), 1 - 0.5 / self.images)
        return math.sqrt(p * (1 - p) / self.images)


def published(name: str) -> str:
    """A model's or dataset's name as a report gives it: of an absolute path the last part, as reports are published."""
    return Path(name).name if Path(name).is_absolute() else name


def format_share(share: float) -> str:
    """0.9339 -> "93.39 %"."""
    return f"{100 * share:.2f} %"


def format_count(count: float) -> str:
    """1814073344 -> "1.814 G"."""
    return _scaled(count, ("", "k", "M", "G", "T"), 4)


def format_bytes(size: float) -> str:
    """46837096 -> "46.8 MB" (decimal)."""
    return _scaled(size, ("B", "kB", "MB", "GB"), 3)


def format_ms(milliseconds: float) -> str:
    """71.23 -> "71.2 ms"."""
    return f"{_digits(milliseconds, 3)} ms"


def _digits(value: float, significant: int) -> str:
    """Fixed-point text with so many significant digits, as far as digits after the point can give them."""
    whole = len(str(int(abs(value))))
    return f"{value:.{max(0, significant - whole)}f}"


def _scaled(value: float, units: Sequence[str], significant: int) -> str:
    power = 0
    while value >= 999.95 and power + 1 < len(units):
        value, power = value / 1000, power + 1
    return f"{value:,.0f} {units[0]}".strip() if power == 0 else f"{_digits(value, significant)} {units[power]}"


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass over a batch: median, 10th and 90th percentile of `runs` runs."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Footprint:
    """What a network costs: parameters, MACs per image, bytes of its safetensors file, latency by batch size.

    `folded_ms` is the latency as the network would be deployed (`folding.fold`).
    """

    parameters: int
    macs: int
    file_bytes: int
    latency_ms: dict[int, Latency]
    folded_ms: dict[int, Latency] = field(default_factory=dict)


def format_cost(cost: str, value: float) -> str:
    """("macs", 1200) -> "1,200 MACs per image"; ("latency", 3.14159) -> "3.14 ms a batch"."""
    if cost == "latency":
        return f"{value:.3g} ms a batch"
    return f"{value:,.0f} {'MACs per image' if cost == 'macs' else 'parameters'}"


def format_precision(precision: str) -> str:
    """Return "fp32" for "no", which asks for no mixed precision; other names as they are."""
    return "fp32" if precision == "no" else precision
