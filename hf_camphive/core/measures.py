"""Measurements of a network as plain data (accuracy, footprint, latency), and how figures are written."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Accuracy:
    """Shares of images, in [0, 1], whose label has the largest logit (top1) or one of the five largest (top5)."""

    top1: float
    top5: float
    images: int
    split: str

    @property
    def standard_error(self) -> float:
        """Standard error of top1, sqrt(p (1 - p) / N), with p kept at least half an image away from 0 and 1."""
        p = min(max(self.top1, 0.5 / self.images), 1 - 0.5 / self.images)
        return math.sqrt(p * (1 - p) / self.images)


def published(name: str) -> str:
    """Return a model's or dataset's name for a report: of an absolute path only the last part, as reports are public."""
    return Path(name).name if Path(name).is_absolute() else name


def format_share(share: float) -> str:
    """Format a share in percent: 0.9339 becomes "93.39 %"."""
    return f"{100 * share:.2f} %"


def format_count(count: float) -> str:
    """Format a count with four digits: 1814073344 becomes "1.814 G"."""
    return _scaled(count, ("", "k", "M", "G", "T"), 4)


def format_bytes(size: float) -> str:
    """Format bytes in decimal units: 46837096 becomes "46.8 MB"."""
    return _scaled(size, ("B", "kB", "MB", "GB"), 3)


def format_ms(milliseconds: float) -> str:
    """Format milliseconds with three digits: 71.23 becomes "71.2 ms"."""
    return f"{_digits(milliseconds, 3)} ms"


def _digits(value: float, significant: int) -> str:
    """Return fixed-point text with this many significant digits; digits before the point are never rounded away."""
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
    """Cost of a network: parameters, MACs per image, bytes of its safetensors file, latency by batch size.

    `folded_ms` is the latency of the network as it would be deployed (`network.surgery.folding.fold`).
    """

    parameters: int
    macs: int
    file_bytes: int
    latency_ms: dict[int, Latency]
    folded_ms: dict[int, Latency] = field(default_factory=dict)


def format_cost(cost: str, value: float) -> str:
    """Format a cost with its unit: ("macs", 1200) becomes "1,200 MACs per image", ("latency", 3.14159) "3.14 ms per batch"."""
    if cost == "latency":
        return f"{value:.3g} ms per batch"
    return f"{value:,.0f} {'MACs per image' if cost == 'macs' else 'parameters'}"


def format_precision(precision: str) -> str:
    """Return "fp32" for "no", which asks for no mixed precision; other names as they are."""
    return "fp32" if precision == "no" else precision
