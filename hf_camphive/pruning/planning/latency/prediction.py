"""Predicted milliseconds of a network at any widths, from a table of its operations timed on the present device.

    ms = scale * sum over operations of their time alone + overhead * number of operations

Operations (identified by kernel, stride, padding, groups, sizes, batch and dtype) are timed on a grid of widths and kept
in a cache; between grid points times are interpolated. `scale` and `overhead` account for caches and Python when
operations run in a row. They are fitted to a few whole networks, from the full one to a narrow and shallow one, which
are timed in every run, since the machine may be faster or slower than when the table was made.
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

from hf_camphive.core.plan import Branch
from hf_camphive.core.runtime import ALONE, Workers
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.modeling.layers import Shortcut
from hf_camphive.network.modeling.resizing import resize, widths_of
from hf_camphive.network.surgery.folding import fold
from hf_camphive.pruning.planning.costs import CostTerm, axis_widths, stream_width
from hf_camphive.pruning.planning.latency.operations import Operation, network_operations
from hf_camphive.pruning.planning.latency.timing import LatencyTable, Prepare
from hf_camphive.pruning.tuning import ALIGNED, MAX_GRID_POINTS, RANK_TOLERANCE

logger = logging.getLogger(__name__)


# The grid


@dataclass(frozen=True)
class Axis:
    """Hold the sizes of one width at which an operation is timed, in two ascending families.

    `aligned` are `rest` plus multiples of `unit`, and the full width; `ragged` are other sizes, at which many kernels are
    slower.
    """

    aligned: tuple[int, ...]
    ragged: tuple[int, ...] = ()
    rest: int = 0
    unit: int = 1

    def family(self, size: int) -> tuple[int, ...]:
        """Return the family between whose sizes the time at `size` is interpolated."""
        is_aligned = (size - self.rest) % self.unit == 0 or size == self.aligned[-1]
        return self.aligned if is_aligned or not self.ragged else self.ragged


@dataclass(frozen=True)
class Grid:
    """Hold the points at which one operation is timed, and interpolate between them.

    With more than two axes, the points are those at which all shrink by the same share.
    """

    axes: tuple[Axis, ...]

    def points(self) -> list[tuple[int, ...]]:
        """Return all combinations of sizes that are timed."""
        if len(self.axes) > 2:
            return [tuple(max(1, axis.aligned[-1] * quarters // 4) for axis in self.axes) for quarters in range(1, 5)]
        return list(product(*(sorted({*axis.aligned, *axis.ragged}) for axis in self.axes)))

    def interpolate(self, sizes: tuple[int, ...], at: Callable[[tuple[int, ...]], float]) -> float:
        """Return the time at `sizes`, linear between the nearest points of the family of each size."""
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
    """Return the indices of the ascending points around a value, and its share of the way between them, in [0, 1]."""
    high = min(bisect_left(points, value), len(points) - 1)
    low = max(high - 1, 0)
    if value >= points[high] or low == high:
        return high, high, 0.0
    return low, high, max(0.0, (value - points[low]) / (points[high] - points[low]))


def grid_of(op: Operation, sizes: Mapping[str, int], floor: Mapping[str, int], step: int) -> Grid:
    """Return the points at which to time an operation when widths are multiples of `step`.

    Groups that are absent from `floor` keep their size.
    """
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
        even, odd_ones = (tuple(rest + repeat * c for c in counts) for counts in (aligned, ragged))
        axes.append(Axis(even, odd_ones, rest, repeat * ALIGNED))
    return Grid(tuple(axes))


def _thinned(counts: Sequence[int], most: int) -> list[int]:
    """Return at most `most` of the ascending counts, among them the first and the last, denser where they are small."""
    if len(counts) <= most:
        return list(counts)
    picked = {round((len(counts) - 1) * (i / (most - 1)) ** 1.5) for i in range(most)}
    return [counts[i] for i in sorted(picked)]


# The network


@dataclass(frozen=True)
class LatencyRequest:
    """Specify the latency to predict: of batches of `batch` images, and with `folded` of the network as deployed (`fold`).

    `floor` holds the fewest channels of each group that may be pruned (`limits.floors`); widths are multiples of `step`.
    """

    floor: Mapping[str, int]
    batch: int = 1
    folded: bool = False
    step: int = 1


def latency_terms(
    net: nn.Module,
    analysis: NetworkAnalysis,
    table: LatencyTable,
    request: LatencyRequest,
    workers: Workers = ALONE,
) -> tuple[CostTerm, ...]:
    """Return the operations of `net` as cost terms in milliseconds per batch, in eval mode and channels_last format.

    Times the operations that `table` lacks, and a few whole networks.
    """
    dtype = next(net.parameters()).dtype
    operations = network_operations(analysis, request.batch, request.folded)
    sizes = {group.name: group.size for group in analysis.groups}
    grids = [grid_of(op, sizes, request.floor, request.step) for op in operations]
    samples: list[tuple[Sample, str]] = []
    networks: dict[str, Prepare] = {}
    for sample in _samples(sizes, analysis.branches, request):
        small = _sampled(net, analysis, sample)
        if small is not None:
            key = _network_key(operations, sample, request, dtype)
            networks[key] = _prepare_network(small, analysis.trace.input_size, request, table.device)
            samples.append((sample, key))
    table.measure(_works(operations, grids, table.device, dtype), workers)
    table.measure_networks(networks, workers)
    times = [_time_alone(op, grid, table, dtype) for op, grid in zip(operations, grids)]
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


def _works(
    operations: Iterable[Operation], grids: Iterable[Grid], device: torch.device, dtype: torch.dtype
) -> dict[str, Prepare]:
    """Return every operation at every point of its grid, by its key in the table."""
    works: dict[str, Prepare] = {}
    for op, grid in zip(operations, grids):
        for point in grid.points():
            key, args = op.at(point, dtype)
            works[key] = _prepare_operation(op.target, args, device, dtype)
    return works


def _time_alone(op: Operation, grid: Grid, table: LatencyTable, dtype: torch.dtype) -> Callable[..., float]:
    """Return the function from an operation's widths to its own time, interpolated between the grid's points."""
    at = cache(lambda point: table.ms[op.at(point, dtype)[0]])
    return cache(lambda *found: grid.interpolate(found, at))


def fit(totals: Sequence[tuple[float, int]], measured: Sequence[float]) -> tuple[float, float]:
    """Fit (scale, overhead), neither negative, to the times of whole networks by least squared relative error.

        measured ~ scale * (sum of operations' times) + overhead * (number of operations)

    `totals` are (sum, number) of each network. If the networks are too similar to separate the two (`RANK_TOLERANCE`),
    or a value would be negative, the overhead is 0.
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
    """Describe a network that is timed as a whole: channels kept of each group, and dropped residual branches."""

    kept: Mapping[str, int]
    dropped: frozenset[str] = frozenset()


def _samples(sizes: Mapping[str, int], branches: Sequence[Branch], request: LatencyRequest) -> tuple[Sample, ...]:
    """Return the networks to time: full, half in width and depth, a quarter in width and a third in depth, narrowest."""
    floor, step = request.floor, request.step

    def cut(share: float) -> dict[str, int]:
        """Return widths of about this share, multiples of `step` and no less than the floors."""
        counts = {name: -(-int(share * size) // step) * step for name, size in sizes.items()}
        return {
            name: min(max(floor[name], counts[name], min(step, size)), size) if name in floor else size
            for name, size in sizes.items()
        }

    modules = [branch.module for branch in branches]
    two_thirds = frozenset(module for i, module in enumerate(modules) if i % 3)
    half = Sample(cut(0.5), frozenset(modules[::2]))
    return Sample(dict(sizes)), half, Sample(cut(0.25), two_thirds), Sample(cut(0))


def _network_key(operations: Sequence[Operation], sample: Sample, request: LatencyRequest, dtype: torch.dtype) -> str:
    """Return the key of a whole network in the table, a digest of its operations' keys."""
    keys = [op.at(op.sizes_at(sample.kept), dtype)[0] for op in operations if op.branch not in sample.dropped]
    digest = hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
    return f"network {digest} batch {request.batch}{' folded' if request.folded else ''}"


def _prepare_operation(
    target: Callable[..., Any], args: Sequence[Any], device: torch.device, dtype: torch.dtype
) -> Prepare:
    """Return the function that allocates an operation's arguments and returns a call of it."""

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
    net: nn.Module, input_size: tuple[int, int, int], request: LatencyRequest, device: torch.device
) -> Prepare:
    """Return the function that readies a network, folded if requested, and returns a call of it on a batch."""

    @cache
    def prepare() -> Callable[[], object]:
        ready = fold(net, input_size) if request.folded else copy.deepcopy(net).eval()
        ready = ready.to(device).to(memory_format=torch.channels_last)
        dtype = next(ready.parameters()).dtype
        images = torch.full((request.batch, *input_size), 0.5, device=device, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        return lambda: ready(images)

    return prepare


def _sampled(net: nn.Module, analysis: NetworkAnalysis, sample: Sample) -> nn.Module | None:
    """Return a copy with the widths and branches of a sample, whichever channels; None if the network's code forbids them."""
    shapes, branches = analysis.shapes, analysis.branches
    widths = axis_widths(analysis.groups, shapes)
    small = copy.deepcopy(net)
    sized = {}
    for name, shape in widths_of(net).items():
        # A tensor that belongs to no layer is listed by its own name.
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
