"""Predicted milliseconds of a network at any widths, from a table of its operations timed on the present device.

    ms = scale * sum over operations of their time alone + overhead * number of operations

The operations (with their kernel, stride, padding, groups, sizes, batch, dtype) are timed on a grid of widths and kept in a
cache; between grid points times are interpolated. `scale` and `overhead` are what makes the sum right for a few whole
networks, from the full one to a narrow and shallow one: what running in a row and Python add. These are timed in every run,
since the machine may be faster or slower than on the day of the table.
"""

import copy
import hashlib
import logging
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import nn

from hf_camphive.core.plan import Branch, ChannelGroup
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.network.modeling.modeling_camphive import Shortcut, resize, widths_of
from hf_camphive.network.surgery.folding import fold
from hf_camphive.pruning.planning.costs import CostTerm, axis_widths, stream_width
from hf_camphive.pruning.planning.latency.operations import Operation, network_operations
from hf_camphive.pruning.planning.latency.timing import LatencyTable, Prepare

logger = logging.getLogger(__name__)
ALIGNED = 8
MAX_GRID_POINTS = {1: 16, 2: 8}  # of the grid along each axis, by number of axes
RANK_TOLERANCE = 0.02  # singular values below this share of the largest count as zero


# The grid


@dataclass(frozen=True)
class Axis:
    """The sizes of one width at which an operation is timed, in two ascending families.

    `aligned` are multiples of `unit` above `rest` and the full width; many kernels take longer for the `ragged` ones.
    """

    aligned: tuple[int, ...]
    ragged: tuple[int, ...] = ()
    rest: int = 0
    unit: int = 1

    def family(self, size: int) -> tuple[int, ...]:
        """Those among which the time at `size` is found."""
        is_aligned = (size - self.rest) % self.unit == 0 or size == self.aligned[-1]
        return self.aligned if is_aligned or not self.ragged else self.ragged


@dataclass(frozen=True)
class Grid:
    """The points at which one operation is timed, and its time at any other; with more than two axes, all shrink together."""

    axes: tuple[Axis, ...]

    def points(self) -> list[tuple[int, ...]]:
        """All combinations of sizes that are timed."""
        if len(self.axes) > 2:
            return [tuple(max(1, axis.aligned[-1] * part // 4) for axis in self.axes) for part in range(1, 5)]
        return list(product(*(sorted({*axis.aligned, *axis.ragged}) for axis in self.axes)))

    def interpolate(self, sizes: tuple[int, ...], at: Callable[[tuple[int, ...]], float]) -> float:
        """The time at `sizes`: linear between the nearest points of the family of each size."""
        if len(self.axes) > 2:
            points = self.points()
            low, high, t = _bracket([sum(point) for point in points], sum(sizes))
            return (1 - t) * at(points[low]) + t * at(points[high])
        weighted: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for size, axis in zip(sizes, self.axes):
            family = axis.family(size)
            low, high, t = _bracket(family, size)
            ends = [(family[low], 1 - t), (family[high], t)]
            weighted = [((*point, end), w * share) for point, w in weighted for end, share in ends if share]
        return sum(weight * at(point) for point, weight in weighted)


def _bracket(points: Sequence[int], value: int) -> tuple[int, int, float]:
    """Indices of the ascending points around a value, and how far it is from one to the other in [0, 1]."""
    high = min(bisect_left(points, value), len(points) - 1)
    low = max(high - 1, 0)
    if value >= points[high] or low == high:
        return high, high, 0.0
    return low, high, max(0.0, (value - points[low]) / (points[high] - points[low]))


def grid_of(op: Operation, sizes: Mapping[str, int], floor: Mapping[str, int], step: int) -> Grid:
    """Where to time an operation if widths go in steps of `step`; groups absent from `floor` keep their size."""
    varying = [width for width in op.widths if any(group in floor for group, _ in width.groups)]
    most = MAX_GRID_POINTS.get(len(varying), 2)
    axes = []
    for width in op.widths:
        full = width.at(sizes)
        free = [(group, repeat) for group, repeat in width.groups if group in floor]
        if not free:
            axes.append(Axis((full,)))
            continue
        repeat = min(repeat for _, repeat in free)
        rest = full - sum(sizes[group] * r for group, r in free)
        count = (full - rest) // repeat
        aligned = _thinned(sorted({*range(ALIGNED, count + 1, ALIGNED), count}), most)
        odd = {*range(1, count, ALIGNED), *range(ALIGNED - 1, count, ALIGNED), count}
        ragged = _thinned(sorted(odd), most) if step % ALIGNED else []
        sizes_at = [tuple(rest + repeat * c for c in counts) for counts in (aligned, ragged)]
        axes.append(Axis(*sizes_at, rest, repeat * ALIGNED))
    return Grid(tuple(axes))


def _thinned(counts: Sequence[int], most: int) -> list[int]:
    """At most so many of the ascending counts, the first and the last among them, dense where they are small."""
    if len(counts) <= most:
        return list(counts)
    picked = {round((len(counts) - 1) * (i / (most - 1)) ** 1.5) for i in range(most)}
    return [counts[i] for i in sorted(picked)]


# The network


def latency_parts(
    net: nn.Module,
    trace: Trace,
    branches: Sequence[Branch],
    floor: Mapping[str, int],
    table: LatencyTable,
    *,
    batch: int,
    folded: bool,
    step: int,
    progress: bool = False,
) -> tuple[CostTerm, ...]:
    """The operations of `net` as parts whose costs are milliseconds for a batch of `batch` images, eval mode, channels_last.

    `floor` are the fewest channels of each group that may change (`limits.floors`), `step` is what widths are multiples of.
    Measures what the table lacks, and a few whole networks.
    """
    tensors = named_tensors(net)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = next(net.parameters()).dtype
    sizes = {group.name: group.size for group in trace.groups}
    operations = network_operations(trace, branches, shapes, batch, folded)
    grids = [grid_of(op, sizes, floor, step) for op in operations]
    works: dict[str, Prepare] = {}
    for op, grid in zip(operations, grids):
        for point in grid.points():
            key, args = op.at(point, dtype)
            works[key] = _prepare_operation(op.target, args, table.device, dtype)
    samples: list[tuple[Sample, str]] = []
    networks: dict[str, Prepare] = {}
    for sample in _samples(sizes, floor, branches, step):
        small = _sampled(net, trace.groups, branches, shapes, sample)
        if small is not None:
            key = _network_key(operations, sample, batch, folded, dtype)
            networks[key] = _prepare_network(small, trace.input_size, batch, folded, table.device)
            samples.append((sample, key))
    table.measure(works, progress)
    table.measure_networks(networks, progress)

    def alone(op: Operation, grid: Grid) -> Callable[..., float]:
        at = cache(lambda point: table.ms[op.at(point, dtype)[0]])
        return cache(lambda *found: grid.interpolate(found, at))

    times = [alone(op, grid) for op, grid in zip(operations, grids)]
    sums = [
        [time(*op.sizes_at(sample.kept)) for op, time in zip(operations, times) if op.branch not in sample.dropped]
        for sample, _ in samples
    ]
    scale, overhead = fit([(sum(found), len(found)) for found in sums], [table.ms[key] for _, key in samples])
    logger.debug("Latency: %.3f times the sum of the operations, and %.4f ms for each", scale, overhead)
    return tuple(
        CostTerm(op.widths, lambda *found, time=time: scale * time(*found) + overhead, op.branch)
        for op, time in zip(operations, times)
    )


def fit(totals: Sequence[tuple[float, int]], measured: Sequence[float]) -> tuple[float, float]:
    """(scale, overhead), neither below zero, with the least squared relative error of scale * sum + overhead * operations.

    `totals` are (sum, operations) of some networks, `measured` their times. Networks that are too much alike to tell the
    two apart give a scale alone.
    """
    shares = torch.tensor(totals, dtype=torch.float64) / torch.tensor(measured, dtype=torch.float64)[:, None]
    lengths = shares.norm(dim=0)
    found = torch.linalg.lstsq(
        shares / lengths, torch.ones(len(shares), 1).double(), rcond=RANK_TOLERANCE, driver="gelsd"
    )
    scale, overhead = (found.solution[:, 0] / lengths).tolist()
    if found.rank == 2 and scale > 0 and overhead >= 0:
        return scale, overhead
    return float(shares[:, 0].sum() / shares[:, 0].square().sum()), 0.0


@dataclass(frozen=True)
class Sample:
    """A network that is timed as a whole: the channels left of each group, and the residual branches that are dropped."""

    kept: Mapping[str, int]
    dropped: frozenset[str] = frozenset()


def _samples(
    sizes: Mapping[str, int], floor: Mapping[str, int], branches: Sequence[Branch], step: int
) -> tuple[Sample, ...]:
    """The full network, a half in width and depth, a quarter and a third, and the narrowest."""

    def cut(share: float) -> dict[str, int]:
        counts = {name: -(-int(share * size) // step) * step for name, size in sizes.items()}
        return {
            name: min(max(floor[name], counts[name], min(step, size)), size) if name in floor else size
            for name, size in sizes.items()
        }

    modules = [branch.module for branch in branches]
    two_thirds = frozenset(module for i, module in enumerate(modules) if i % 3)
    half = Sample(cut(0.5), frozenset(modules[::2]))
    return Sample(dict(sizes)), half, Sample(cut(0.25), two_thirds), Sample(cut(0))


def _network_key(operations: Sequence[Operation], sample: Sample, batch: int, folded: bool, dtype: torch.dtype) -> str:
    keys = [op.at(op.sizes_at(sample.kept), dtype)[0] for op in operations if op.branch not in sample.dropped]
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
    return f"network {digest} batch {batch}{' folded' if folded else ''}"


def _prepare_operation(
    target: Callable[..., Any], args: Sequence[Any], device: torch.device, dtype: torch.dtype
) -> Prepare:
    def value(arg: Any) -> Any:
        if isinstance(arg, dict):
            tensor = torch.full(arg["shape"], 0.5, device=device, dtype=dtype)
            return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        return [value(item) for item in arg] if isinstance(arg, list) else arg

    def prepare() -> Callable[[], object]:
        values = [value(arg) for arg in args]
        return lambda: target(*values)

    return prepare


def _prepare_network(
    net: nn.Module, input_size: tuple[int, int, int], batch: int, folded: bool, device: torch.device
) -> Prepare:
    @cache
    def prepare() -> Callable[[], object]:
        ready = fold(net, input_size) if folded else copy.deepcopy(net).eval()
        ready = ready.to(device, memory_format=torch.channels_last)
        dtype = next(ready.parameters()).dtype
        images = torch.full((batch, *input_size), 0.5, device=device, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        return lambda: ready(images)

    return prepare


def _sampled(
    net: nn.Module,
    groups: Iterable[ChannelGroup],
    branches: Iterable[Branch],
    shapes: Mapping[str, Sequence[int]],
    sample: Sample,
) -> nn.Module | None:
    """A copy as narrow and shallow as the sample, whichever channels; None where the network's own code does not allow that."""
    widths = axis_widths(groups, shapes)
    small = copy.deepcopy(net)
    sized = {}
    for name, shape in widths_of(net).items():
        # A tensor that belongs to no layer stands under its own name.
        own = (name, *(f"{name}.{key}" for key in ("weight", "constant", "running_mean")))
        tensor = next(key for key in own if key in shapes)
        sized[name] = [
            widths[tensor, axis].at(sample.kept) if (tensor, axis) in widths else size
            for axis, size in enumerate(shape)
        ]
    try:
        resize(small, sized, {})
        for branch in branches:
            if branch.module in sample.dropped:
                block, channels = small.get_submodule(branch.module), stream_width(branch, widths).at(sample.kept)
                small.set_submodule(branch.module, Shortcut(block, branch.shortcut, branch.after, channels))
    except (ValueError, RuntimeError) as error:
        logger.debug("The network cannot be made as narrow as it may get: %s", error)
        return None
    return small
