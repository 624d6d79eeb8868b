"""Predicted milliseconds of a network at any widths, from a table of its operations timed on the present device.

    ms = scale * sum over operations of their time alone + overhead * number of operations

The operations (with their kernel, stride, padding, groups, sizes, batch, dtype) are timed on a grid of widths and kept in a
cache; between grid points times are interpolated. `scale` and `overhead` are what makes the sum right for the whole network at
its full and its smallest widths: what running in a row and Python add.
"""

import copy
import hashlib
import json
import logging
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, fx, nn
from tqdm.auto import tqdm

from .branches import operations_inside
from .folding import fold_batchnorm, foldable
from .graph import named_tensors, operation
from .modeling_camphive import resize, widths_of
from .plan import Branch, ChannelGroup
from .planning import Part, Width, axis_widths
from .report import environment
from .tracing import Trace

logger = logging.getLogger(__name__)
SCHEMA = 1
ALIGNED = 8
MOST_POINTS = {1: 16, 2: 8}  # of the grid along each axis, by number of axes
ROUNDS, SECONDS_A_ROUND, MOST_CALLS = 5, 0.003, 20
CHUNK = 256  # entries that take turns, and are then kept
_FREE = ("dropout", "feature_dropout", "detach", "alias", "to", "_to_copy", "contiguous", "lift_fresh_copy")

Prepare = Callable[[], Callable[[], object]]  # makes the inputs, returns what is to be timed
Timer = Callable[[Mapping[str, Prepare], torch.device, bool], dict[str, float]]
Dim = int | Width


@dataclass(frozen=True)
class Shape:
    """Shape of a tensor argument, some sizes of which are widths."""

    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Operation:
    """One operation of a network: `args` hold a `Shape` for each tensor, and a `Width` where the number of groups is one."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    branch: str | None

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """The different widths that its time depends on."""
        return tuple(dict.fromkeys(_widths(self.args)))

    def at(self, sizes: Sequence[int], dtype: torch.dtype) -> tuple[str, tuple[Any, ...]]:
        """Its name in the table and its arguments, tensors as lists of sizes, where its widths have these sizes."""
        args = _concrete(self.args, dict(zip(self.widths, sizes)))
        name = self.target._schema.name.split("::")[1]
        return f"{name} {str(dtype).removeprefix('torch.')} {json.dumps(args, default=str)}", args


def _widths(value: Any) -> Iterator[Width]:
    if isinstance(value, Width):
        yield value
    for item in value.dims if isinstance(value, Shape) else value if isinstance(value, tuple) else ():
        yield from _widths(item)


def _concrete(value: Any, sizes: Mapping[Width, int]) -> Any:
    if isinstance(value, Width):
        return sizes[value]
    if isinstance(value, Shape):
        return {"shape": [_concrete(dim, sizes) for dim in value.dims]}
    return [_concrete(item, sizes) for item in value] if isinstance(value, tuple) else value


# The operations of a network


def network_operations(
    trace: Trace, branches: Iterable[Branch], shapes: Mapping[str, Sequence[int]], batch: int, folded: bool
) -> tuple[Operation, ...]:
    """Operations of a traced network that take time, for batches of `batch` images.

    With `folded`, batch norms that follow a convolution are left out and that convolution has a bias instead.
    """
    graph = trace.graph
    norms = foldable(graph) if folded else {}
    widths = axis_widths(trace.groups, shapes)
    sizes = {group.name: group.size for group in trace.groups}
    inside = operations_inside(graph, branches)
    dims: dict[fx.Node, tuple[Dim, ...]] = {graph.image: (batch, *trace.input_size)}
    for node, name in graph.tensors.items():
        dims[node] = tuple(widths.get((name, axis), size) for axis, size in enumerate(shapes[name]))
    for node, value in graph.constants.items():
        dims[node] = tuple(value.shape)
    found = []
    for node in graph.operations:
        if isinstance(value := node.meta.get("val"), Tensor):
            dims[node] = _dims(node, _static(value, batch), dims, sizes)
        if node in norms or not _takes_time(node, dims):
            continue
        args = tuple(_argument(arg, dims) for arg in node.args)
        if operation(node) == "conv2d":
            args = _convolution_arguments(args, biased=node in norms.values())
        found.append(Operation(node.target, args, inside.get(node.name)))
    return tuple(found)


def _static(value: Tensor, batch: int) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else batch for size in value.shape)


def _takes_time(node: fx.Node, dims: Mapping[fx.Node, tuple[Dim, ...]]) -> bool:
    """Whether an operation computes something, from tensors and numbers that are known here."""
    if node not in dims or not isinstance(node.target, torch._ops.OpOverload) or operation(node) in _FREE:
        return False
    if any(result.alias_info is not None for result in node.target._schema.returns):
        return False  # a view
    return all(used in dims for used in node.all_input_nodes)


def _argument(arg: Any, dims: Mapping[fx.Node, tuple[Dim, ...]]) -> Any:
    if isinstance(arg, fx.Node):
        return Shape(dims[arg])
    return tuple(_argument(item, dims) for item in arg) if isinstance(arg, (list, tuple)) else arg


def _convolution_arguments(args: tuple[Any, ...], biased: bool) -> tuple[Any, ...]:
    """Arguments of conv2d, all seven; a depthwise convolution has as many groups as channels, however many those are."""
    images, weight, bias, stride, padding, dilation, groups = (
        *args,
        *(None, (1, 1), (0, 0), (1, 1), 1)[len(args) - 2 :],
    )
    if groups > 1 and weight.dims[1] == 1:
        groups = images.dims[1]
    if biased:
        bias = Shape((weight.dims[0],))
    return images, weight, bias, stride, padding, dilation, groups


def _dims(
    node: fx.Node, shape: tuple[int, ...], dims: Mapping[fx.Node, tuple[Dim, ...]], sizes: Mapping[str, int]
) -> tuple[Dim, ...]:
    """The shape of a result, with widths in place of sizes as far as its inputs tell; elsewhere widths count as full."""
    name, inputs = operation(node), [dims[used] for used in node.all_input_nodes if used in dims]
    result: list[Dim] = list(shape)
    if name in ("conv2d", "linear") and node.args[1] in dims:
        result[1 if name == "conv2d" else -1] = dims[node.args[1]][0]
    elif name in ("permute", "transpose") and len(inputs) == 1:
        order = list(range(len(shape)))
        if name == "permute":
            order = node.args[1]
        else:
            a, b = node.args[1:3]
            order[a], order[b] = order[b], order[a]
        result = [inputs[0][axis] for axis in order]
    elif name == "cat":
        axis = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
        result = [_total([d[i] for d in inputs]) if i == axis else inputs[0][i] for i in range(len(shape))]
    else:
        for source in inputs:
            if len(source) != len(shape) and len(inputs) > 1:
                continue  # a norm's weight, or an operand that is broadcast
            for axis, dim in enumerate(source):
                if isinstance(dim, Width):
                    _carry(result, dim, axis, len(source), dim.at(sizes))
    return tuple(result)


def _carry(result: list[Dim], width: Width, axis: int, rank: int, size: int) -> None:
    """Put an input's width where the result has its size: at the same place, or, reshaped, the first that is a multiple."""
    if rank == len(result):
        if result[axis] == size:
            result[axis] = width
        return
    for i, found in enumerate(result[1:], 1):
        if isinstance(found, int) and found % size == 0:
            times = found // size
            result[i] = Width(width.fixed * times, tuple((group, repeat * times) for group, repeat in width.groups))
            return


def _total(dims: Sequence[Dim]) -> Dim:
    widths = [dim if isinstance(dim, Width) else Width(dim) for dim in dims]
    repeats: dict[str, int] = {}
    for width in widths:
        for group, repeat in width.groups:
            repeats[group] = repeats.get(group, 0) + repeat
    return Width(sum(width.fixed for width in widths), tuple(repeats.items()))


# The grid


@dataclass(frozen=True)
class Grid:
    """The points at which one operation is timed, and its time at any other.

    `axes` holds for each width the sizes that are timed, in two families: those of a multiple of eight channels (or all
    channels), and the ragged ones, which many kernels take longer for. With more than two axes, all widths shrink together.
    """

    axes: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    full: tuple[int, ...]

    def points(self) -> Iterator[tuple[int, ...]]:
        """All combinations of sizes that are timed."""
        if len(self.axes) > 2:
            yield from (tuple(max(1, size * part // 4) for size in self.full) for part in range(1, 5))
            return
        points: list[tuple[int, ...]] = [()]
        for aligned, ragged in self.axes:
            points = [(*point, size) for point in points for size in sorted({*aligned, *ragged})]
        yield from points

    def interpolate(self, sizes: tuple[int, ...], at: Callable[[tuple[int, ...]], float]) -> float:
        """The time at `sizes`: linear between the nearest points of the family of each size."""
        if len(self.axes) > 2:
            points = list(self.points())
            low, high, t = _bracket([sum(point) for point in points], sum(sizes))
            return (1 - t) * at(points[low]) + t * at(points[high])
        weighted: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
        for size, (aligned, ragged) in zip(sizes, self.axes):
            family = aligned if size in aligned or not ragged or _lies_between(size, aligned) else ragged
            low, high, t = _bracket(family, size)
            ends = [(family[low], 1 - t), (family[high], t)]
            weighted = [((*point, end), w * share) for point, w in weighted for end, share in ends if share]
        return sum(weight * at(point) for point, weight in weighted)


def _lies_between(size: int, aligned: tuple[int, ...]) -> bool:
    """Whether a size that is not timed is a multiple of what the timed ones are, left out because there are too many."""
    step = aligned[0]
    return size % step == 0 and size > step


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
    most = MOST_POINTS.get(len(varying), 2)
    axes = []
    for width in op.widths:
        full = width.at(sizes)
        free = [(group, repeat) for group, repeat in width.groups if group in floor]
        if not free:
            axes.append(((full,), ()))
            continue
        repeat = min(repeat for _, repeat in free)
        rest = full - sum(sizes[group] * r for group, r in free)
        count = (full - rest) // repeat
        aligned = _thinned(sorted({*range(ALIGNED, count + 1, ALIGNED), count}), most)
        odd = [*range(1, count, ALIGNED), *range(ALIGNED - 1, count, ALIGNED)]
        ragged = _thinned(sorted({*odd, count}), most) if step % ALIGNED else ()
        axes.append(tuple(tuple(rest + repeat * c for c in counts) for counts in (aligned, ragged)))
    return Grid(tuple(axes), tuple(width.at(sizes) for width in op.widths))


def _thinned(counts: Sequence[int], most: int) -> list[int]:
    """At most so many of the ascending counts, the first and the last among them, dense where they are small."""
    if len(counts) <= most:
        return list(counts)
    picked = {round((len(counts) - 1) * (i / (most - 1)) ** 1.5) for i in range(most)}
    return [counts[i] for i in sorted(picked)]


# The table


class LatencyTable:
    """Milliseconds by key, timed once and kept in `folder` (by default where Hugging Face libraries keep theirs).

    One file for each device, number of threads and version of torch. A file that cannot be read is started afresh.
    """

    def __init__(self, device: torch.device | str = "cpu", folder: Path | None = None, timer: Timer | None = None):
        self.device, self.timer = torch.device(device), timer or best_times
        about = environment(self.device)
        self.about = {key: about[key] for key in ("device", "threads", "torch")}
        digest = hashlib.sha256(json.dumps(self.about).encode()).hexdigest()[:16]
        self.path = (folder or Path(constants.HF_HOME, "camphive")) / f"latency-{digest}.json"
        self.ms = self._load()

    def measure(self, works: Mapping[str, Prepare], progress: bool = False) -> None:
        """Time those that are not in the table, and keep them."""
        missing = [key for key in works if key not in self.ms]
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            self.ms |= self.timer({key: works[key] for key in chunk}, self.device, progress)
            self._save()

    def _load(self) -> dict[str, float]:
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            if values["schema"] == SCHEMA:
                return {str(key): float(ms) for key, ms in values["ms"].items()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("The latency table in %s is damaged (%s) and is measured again", self.path, error)
        return {}

    def _save(self) -> None:
        """Write the whole file beside the old one and put it in its place; a run at the same time loses nothing."""
        self.ms = self._load() | self.ms
        text = json.dumps({"schema": SCHEMA, "about": self.about, "ms": self.ms}, indent=0)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            logger.warning("The latency table could not be kept in %s: %s", self.path, error)


def best_times(works: Mapping[str, Prepare], device: torch.device, progress: bool = False) -> dict[str, float]:
    """Milliseconds of each work, the best of some rounds in which all take turns: other load only ever adds time."""
    best = dict.fromkeys(works, float("inf"))
    with torch.no_grad(), tqdm(total=ROUNDS * len(works), desc="Time layers", disable=not progress) as bar:
        for _ in range(ROUNDS):
            for key, prepare in works.items():
                run, began, calls = prepare(), time.perf_counter(), 0
                _milliseconds(run, device)
                while calls < 2 or (calls < MOST_CALLS and time.perf_counter() - began < SECONDS_A_ROUND):
                    best[key] = min(best[key], _milliseconds(run, device))
                    calls += 1
                bar.update()
    return best


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one call; on an accelerator of one in a row of calls, since they overlap there."""
    calls = 1 if device.type == "cpu" else 10
    if calls > 1:
        torch.accelerator.synchronize(device)
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if calls > 1:
        torch.accelerator.synchronize(device)
    return 1000 * (time.perf_counter() - began) / calls


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
) -> tuple[Part, ...]:
    """The operations of `net` as parts whose costs are milliseconds for a batch of `batch` images, eval mode, channels_last.

    `floor` are the fewest channels of each group that may change (`limits.floors`), `step` is what widths are multiples of.
    Measures what the table lacks.
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
    least = {name: max(floor.get(name, size), min(step, size)) for name, size in sizes.items()}
    least |= {name: size for name, size in sizes.items() if name not in floor}
    ends = {"full": sizes, "smallest": least}
    names = {end: _network_key(end, operations, kept, batch, folded, dtype) for end, kept in ends.items()}
    for end, kept in ends.items():
        small = _resized(net, trace.groups, shapes, kept)
        if small is not None:
            works[names[end]] = _prepare_network(small, trace.input_size, batch, folded, table.device)
    table.measure(works, progress)

    def alone(op: Operation, grid: Grid) -> Callable[..., float]:
        at = cache(lambda point: table.ms[op.at(point, dtype)[0]])
        return cache(lambda *found: grid.interpolate(found, at))

    times = [alone(op, grid) for op, grid in zip(operations, grids)]
    sums = {
        end: sum(t(*(w.at(kept) for w in op.widths)) for op, t in zip(operations, times)) for end, kept in ends.items()
    }
    measured = {end: table.ms[name] for end, name in names.items() if name in works}
    scale, overhead = fit(sums, measured, len(operations))
    logger.debug("Latency: %.3f times the sum of the operations, and %.4f ms for each", scale, overhead)
    return tuple(
        Part(op.widths, lambda *found, time=time: scale * time(*found) + overhead, op.branch)
        for op, time in zip(operations, times)
    )


def fit(sums: Mapping[str, float], measured: Mapping[str, float], operations: int) -> tuple[float, float]:
    """(scale, overhead) with measured = scale * sum + overhead * operations at both ends, neither below zero."""
    full = measured["full"], sums["full"]
    if "smallest" in measured and sums["full"] > 1.05 * sums["smallest"]:
        scale = (measured["full"] - measured["smallest"]) / (sums["full"] - sums["smallest"])
        overhead = (full[0] - scale * full[1]) / operations
        if scale > 0 and overhead >= 0:
            return scale, overhead
    return full[0] / full[1], 0.0


def _network_key(
    end: str, operations: Sequence[Operation], kept: Mapping[str, int], batch: int, folded: bool, dtype: torch.dtype
) -> str:
    keys = [op.at([width.at(kept) for width in op.widths], dtype)[0] for op in operations]
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
        ready = fold_batchnorm(net, input_size) if folded else copy.deepcopy(net).eval()
        ready = ready.to(device, memory_format=torch.channels_last)
        dtype = next(ready.parameters()).dtype
        images = torch.full((batch, *input_size), 0.5, device=device, dtype=dtype)
        images = images.contiguous(memory_format=torch.channels_last)
        return lambda: ready(images)

    return prepare


def _resized(
    net: nn.Module, groups: Iterable[ChannelGroup], shapes: Mapping[str, Sequence[int]], kept: Mapping[str, int]
) -> nn.Module | None:
    """A copy with `kept` channels of each group, whichever; None where the network's own code does not allow for that."""
    widths = axis_widths(groups, shapes)
    small = copy.deepcopy(net)
    sized = {}
    for name, shape in widths_of(net).items():
        tensor = next(key for key in (f"{name}.weight", f"{name}.constant", f"{name}.running_mean") if key in shapes)
        sized[name] = [
            widths[tensor, axis].at(kept) if (tensor, axis) in widths else size for axis, size in enumerate(shape)
        ]
    try:
        resize(small, sized, {})
    except (ValueError, RuntimeError) as error:
        logger.debug("The network cannot be made as narrow as it may get: %s", error)
        return None
    return small
