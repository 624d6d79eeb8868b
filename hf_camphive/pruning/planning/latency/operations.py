"""The operations of a traced network that take time, with their sizes as functions of the channel groups' widths.

Pure analysis: runs no operation and reads no weights.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from hf_camphive.core.plan import Branch
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.graph.blocks import operations_inside
from hf_camphive.network.graph.program import TracedProgram, operation
from hf_camphive.network.surgery.folding import foldable, shortcut_targets
from hf_camphive.pruning.planning.costs import Width, axis_widths

_FREE = ("dropout", "feature_dropout", "detach", "alias", "to", "_to_copy", "contiguous", "lift_fresh_copy")
Dim = int | Width


@dataclass(frozen=True)
class Shape:
    """Describe the shape of a tensor argument; each size is a number or a width."""

    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Operation:
    """Describe one operation of a network.

    `args` hold a `Shape` in place of each tensor, and a `Width` where the number of convolution groups depends on one.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    branch: str | None

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """Return the distinct widths that its time depends on."""
        return tuple(dict.fromkeys(_widths(self.args)))

    def sizes_at(self, kept: Mapping[str, int]) -> tuple[int, ...]:
        """Return the sizes of `widths` when `kept` channels of each group remain."""
        return tuple(width.at(kept) for width in self.widths)

    def at(self, sizes: Sequence[int], dtype: torch.dtype) -> tuple[str, tuple[Any, ...]]:
        """Return its key in the table and its arguments when `widths` have these sizes; tensors are {"shape": sizes}."""
        args = _concrete(self.args, dict(zip(self.widths, sizes)))
        name = self.target._schema.name.split("::")[1]
        return f"{name} {str(dtype).removeprefix('torch.')} {json.dumps(args, default=str)}", args


def _widths(value: Any) -> Iterator[Width]:
    """Yield all widths inside an argument, repeated ones too."""
    if isinstance(value, Width):
        yield value
    for item in value.dims if isinstance(value, Shape) else value if isinstance(value, tuple) else ():
        yield from _widths(item)


def _concrete(value: Any, sizes: Mapping[Width, int]) -> Any:
    """Return an argument with each width replaced by its size."""
    if isinstance(value, Width):
        return sizes[value]
    if isinstance(value, Shape):
        return {"shape": [_concrete(dim, sizes) for dim in value.dims]}
    return [_concrete(item, sizes) for item in value] if isinstance(value, tuple) else value


def network_operations(analysis: NetworkAnalysis, batch: int, folded: bool) -> tuple[Operation, ...]:
    """Return the operations of a traced network that take time, for batches of `batch` images.

    With `folded`, a BatchNorm that follows a convolution is replaced by a bias of that convolution, and a block whose
    branch is dropped disappears if its constant can be added to a convolution as well (`folding.fold`).
    """
    graph, branches, shapes = analysis.trace.graph, analysis.branches, analysis.shapes
    norms = foldable(graph) if folded else {}
    widths = axis_widths(analysis.groups, shapes)
    sizes = {group.name: group.size for group in analysis.groups}
    inside = operations_inside(graph, branches) | (_emptied_blocks(graph, branches, norms) if folded else {})
    dims: dict[fx.Node, tuple[Dim, ...]] = {graph.image: (batch, *analysis.trace.input_size)}
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


def _emptied_blocks(
    graph: TracedProgram, branches: Iterable[Branch], norms: Mapping[fx.Node, fx.Node]
) -> dict[str, str]:
    """Return {operation: module} of operations outside a branch that folding removes once the branch is dropped."""
    nodes = {node.name: node for node in graph.operations}
    adds = {}
    for branch in branches:
        shortcuts = [used for used in nodes[branch.add].all_input_nodes if used.name != branch.output]
        if len(shortcuts) == 1:
            adds[branch.module] = nodes[branch.add], shortcuts[0]
    hosts = shortcut_targets(graph, adds, norms)
    return {node.name: module for module, host in hosts.items() for node in host.gone}


def _static(value: Tensor, batch: int) -> tuple[int, ...]:
    """Return a traced value's shape with its symbolic batch size replaced by `batch`."""
    return tuple(size if isinstance(size, int) else batch for size in value.shape)


def _takes_time(node: fx.Node, dims: Mapping[fx.Node, tuple[Dim, ...]]) -> bool:
    """Return True if an operation computes something (no view), and the shapes of all its inputs are known."""
    if node not in dims or not isinstance(node.target, torch._ops.OpOverload) or operation(node) in _FREE:
        return False
    if any(result.alias_info is not None for result in node.target._schema.returns):
        return False  # a view
    return all(used in dims for used in node.all_input_nodes)


def _argument(arg: Any, dims: Mapping[fx.Node, tuple[Dim, ...]]) -> Any:
    """Return an argument with each tensor replaced by its `Shape`, and lists by tuples."""
    if isinstance(arg, fx.Node):
        return Shape(dims[arg])
    return tuple(_argument(item, dims) for item in arg) if isinstance(arg, (list, tuple)) else arg


def _convolution_arguments(args: tuple[Any, ...], biased: bool) -> tuple[Any, ...]:
    """Return all seven arguments of conv2d; the group count of a depthwise convolution is its width."""
    defaults: tuple[Any, ...] = (None, (1, 1), (0, 0), (1, 1), 1)
    images, weight, bias, stride, padding, dilation, groups = args + defaults[len(args) - 2 :]
    if groups > 1 and weight.dims[1] == 1:
        groups = images.dims[1]
    if biased:
        bias = Shape((weight.dims[0],))
    return images, weight, bias, stride, padding, dilation, groups


def _dims(
    node: fx.Node, shape: tuple[int, ...], dims: Mapping[fx.Node, tuple[Dim, ...]], sizes: Mapping[str, int]
) -> tuple[Dim, ...]:
    """Return the shape of a result, with widths in place of sizes where they follow from the inputs' shapes.

    Sizes whose width is not found are constant, as at full width.
    """
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
    """Put an input's width into `result`, in place: on the same axis if the size is the same there, or, after a reshape,
    on the first axis whose size is a multiple of it.
    """
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
    """Return the sum of sizes and widths as one width."""
    widths = [dim if isinstance(dim, Width) else Width(dim) for dim in dims]
    repeats: dict[str, int] = {}
    for width in widths:
        for group, repeat in width.groups:
            repeats[group] = repeats.get(group, 0) + repeat
    return Width(sum(width.fixed for width in widths), tuple(repeats.items()))
