"""Which channels must live or die together, found by following every channel through the network.

Each element of each value carries a label, the channel that it belongs to (an *atom*). Convolutions and linear layers
read atoms and make new ones, operations that only move data are run on the labels themselves, and element-wise
operations couple the atoms that they bring together. What is not understood freezes the atoms that it touches, with the
reason. Pure analysis: no weight is read or changed.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx, nn

from .graph import Graph, export_graph, module_of, operation
from .plan import ChannelGroup, Role, Slot

aten = torch.ops.aten
NO_CHANNEL = -1
ELEMENTWISE = tuple(
    "add sub mul div relu hardtanh clamp silu sigmoid hardsigmoid hardswish tanh gelu elu leaky_relu mish softplus "
    "neg abs exp pow sqrt dropout feature_dropout clone contiguous alias detach _to_copy to".split()
)


@dataclass(frozen=True)
class Trace:
    """A network's graph, its channel groups in forward order, and what its weights cost.

    `positions` is the number of multiply-accumulates per image for each element of a convolution's or linear layer's
    weight: MACs = sum over weights of positions * weight.numel(). `sums` names the groups that meet in each addition.
    """

    graph: Graph
    groups: tuple[ChannelGroup, ...]
    positions: Mapping[str, int]
    sums: Mapping[str, frozenset[str]]
    input_size: tuple[int, int, int]


def trace_network(net: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Find the channel groups of a network for images of `input_size` (C, H, W).

    Raises `ModelError` where the network cannot be traced at all.
    """
    graph = export_graph(net, input_size)
    tracer = _Tracer(graph)
    tracer.walk()
    groups, names = tracer.channel_groups()
    sums = {node.name: tracer.groups_at(node, names) for node in graph.operations if operation(node) == "add"}
    return Trace(graph, groups, dict(tracer.positions), sums, tuple(input_size))


class _Tracer:
    """Label propagation over one graph; `values` holds labels [as the value, batch of 1] or plain numbers."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.parent: list[int] = []  # union-find over atoms
        self.reasons: dict[int, str] = {}  # atom -> why it is frozen
        self.places: dict[int, list[tuple[str, int, Role, int]]] = defaultdict(
            list
        )  # atom -> tensor, axis, role, position
        self.owners: dict[tuple[str, int, int], int] = {}  # tensor, axis, position -> first atom placed there
        self.values: dict[fx.Node, object] = {}
        self.positions: dict[str, int] = defaultdict(int)

    def walk(self) -> None:
        self.values[self.graph.image] = torch.full(_shape(self.graph.image), NO_CHANNEL)
        for node in self.graph.operations:
            handler = HANDLERS.get(operation(node), _unknown)
            try:
                self.values[node] = handler(self, node)
            except _NotUnderstood as reason:
                self.values[node] = _unknown(self, node, str(reason))
        self.freeze(self.labels(self.graph.logits), "output of the network")

    # Atoms

    def new_atoms(self, count: int) -> Tensor:
        first = len(self.parent)
        self.parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, atom: int) -> int:
        while self.parent[atom] != atom:
            self.parent[atom] = atom = self.parent[self.parent[atom]]
        return atom

    def join(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        self.parent[b] = a

    def couple(self, a: Tensor, b: Tensor) -> Tensor:
        """Join the atoms of two label tensors element by element (broadcast); returns the joint labels."""
        a, b = torch.broadcast_tensors(a, b)
        shape, (a, b) = a.shape, (_thin(a, b), _thin(b, a))
        pairs = (a + 1) * (len(self.parent) + 1) + (b + 1)  # one number a pair: much faster to make unique
        for pair in torch.unique(pairs).tolist():
            x, y = (label - 1 for label in divmod(pair, len(self.parent) + 1))
            if x != NO_CHANNEL and y != NO_CHANNEL:
                self.join(x, y)
        return torch.where(a == NO_CHANNEL, b, a).expand(shape)

    def freeze(self, labels: Tensor, reason: str) -> None:
        for atom in torch.unique(_thin(labels)).tolist():
            if atom != NO_CHANNEL:
                self.reasons.setdefault(atom, reason)

    def place(self, atoms: Tensor, tensor: str, axis: int, role: Role) -> None:
        """Note that position i of a tensor's axis belongs to atoms[i]; a tensor used twice couples both uses."""
        for position, atom in enumerate(atoms.tolist()):
            if atom != NO_CHANNEL:
                self.places[atom].append((tensor, axis, role, position))
                self.join(self.owners.setdefault((tensor, axis, position), atom), atom)

    # Values

    def labels(self, value: object) -> Tensor:
        """Labels of an operand; a parameter used directly gets atoms of its own along its one long axis."""
        if not isinstance(value, fx.Node):
            return torch.tensor(NO_CHANNEL)
        if value not in self.values and value in self.graph.tensors:
            self.values[value] = self._parameter_labels(value)
        if value in self.graph.constants:
            return torch.full(_shape(value), NO_CHANNEL)
        return self.values[value]

    def _parameter_labels(self, node: fx.Node) -> Tensor:
        name, shape = self.graph.tensors[node], tuple(node.meta["val"].shape)
        axes = [axis for axis, size in enumerate(shape) if size > 1]
        if not axes:
            return torch.full(shape, NO_CHANNEL)
        atoms = self.new_atoms(shape[axes[-1]])
        self.place(atoms, name, axes[-1], "affine")
        if len(axes) > 1:
            self.freeze(atoms, f"parameter {name} has several axes")
        return atoms.view([-1 if axis == axes[-1] else 1 for axis in range(len(shape))]).expand(shape)

    def channels(self, value: fx.Node, axis: int) -> Tensor:
        """The one atom of each position along an axis. Raises where a position mixes several."""
        labels = self.labels(value)
        rows = _thin(labels, keep=axis % labels.dim()).movedim(axis, 0).reshape(labels.shape[axis], -1)
        atoms = rows.amax(dim=1)
        if not ((rows == atoms[:, None]) | (rows == NO_CHANNEL)).all():
            raise _NotUnderstood("reads an axis whose positions mix channels")
        return atoms

    def weight(self, node: fx.Node, position: int) -> str:
        """Name of the parameter at an argument position. Raises where it is computed instead."""
        tensor = node.args[position]
        if tensor not in self.graph.tensors:
            raise _NotUnderstood("computes its weight")
        return self.graph.tensors[tensor]

    # Groups

    def channel_groups(self) -> tuple[tuple[ChannelGroup, ...], dict[int, str]]:
        """Atoms that were coupled become one channel; channels with the same slots become one group.

        Returns the groups and the name of the group of each channel.
        """
        channels: dict[int, list[tuple[str, int, Role, int]]] = defaultdict(list)
        reasons: dict[int, str] = {}
        for atom in range(len(self.parent)):
            root = self.root(atom)
            channels[root] += self.places[atom]
            if atom in self.reasons:
                reasons.setdefault(root, self.reasons[atom])
        families: dict[tuple, list[int]] = defaultdict(list)
        for root, places in channels.items():
            counts = Counter(place[:3] for place in set(places))
            families[frozenset(counts.items()), reasons.get(root)].append(root)
        groups: list[ChannelGroup] = []
        names: dict[int, str] = {}
        for (_, reason), roots in families.items():
            index: dict[tuple[str, int, Role], list[int]] = {place[:3]: [] for place in channels[roots[0]]}
            for root in roots:
                for tensor, axis, role, position in sorted(set(channels[root])):
                    index[tensor, axis, role].append(position)
            slots = tuple(Slot(tensor, axis, role, tuple(where)) for (tensor, axis, role), where in index.items())
            if not reason and not any(slot.role == "consumer" for slot in slots):
                reason = "nothing reads it"
            if not reason and not any(slot.role == "producer" for slot in slots):
                reason = "nothing produces it"
            if slots:
                name = _group_name(slots, groups)
                names |= dict.fromkeys(roots, name)
                groups.append(ChannelGroup(name, len(roots), slots, reason))
        return tuple(groups), names

    def groups_at(self, node: fx.Node, names: Mapping[int, str]) -> frozenset[str]:
        """Names of the groups whose channels a value holds."""
        labels = self.labels(node)
        atoms = torch.unique(_thin(labels)).tolist() if isinstance(labels, Tensor) else []
        return frozenset(names[self.root(atom)] for atom in atoms if atom != NO_CHANNEL and self.root(atom) in names)


def _group_name(slots: tuple[Slot, ...], groups: list[ChannelGroup]) -> str:
    """Name of the first producer's module, made unique."""
    first = next((slot for slot in slots if slot.role == "producer"), slots[0])
    name = base = first.tensor.removesuffix(".weight")
    taken = {group.name for group in groups}
    count = 1
    while name in taken:
        count += 1
        name = f"{base}#{count}"
    return name


class _NotUnderstood(Exception):
    """An operation that this tracer cannot follow; its message completes "<operation> in <module> ..."."""


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value for a batch of one image (the batch is the only symbolic size)."""
    return tuple(size if isinstance(size, int) else 1 for size in node.meta["val"].shape)


def _thin(labels: Tensor, other: Tensor | None = None, keep: int | None = None) -> Tensor:
    """Drop repetition along expanded axes (stride 0 in both tensors): labels are mostly the same all over an image."""
    for axis in range(labels.dim()):
        repeated = labels.stride(axis) == 0 and (other is None or other.stride(axis) == 0)
        if repeated and axis != keep and labels.shape[axis] > 1:
            labels = labels.narrow(axis, 0, 1)
    return labels


def _spread(atoms: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Labels of a whole value from the atoms along one axis."""
    view = [1] * len(shape)
    view[axis] = -1
    return atoms.view(view).expand(shape)


# Handlers: (tracer, node) -> labels of the result. One row in HANDLERS per operation.


def _unknown(tracer: _Tracer, node: fx.Node, reason: str = "is not understood") -> object:
    """Freeze everything that goes in; what comes out belongs to no channel, unless it is a number."""
    where = f"{operation(node)} in {module_of(node) or 'the network'} {reason}"
    for used in node.all_input_nodes:
        labels = tracer.labels(used)
        for part in labels if isinstance(labels, (tuple, list)) else [labels]:
            if isinstance(part, Tensor):
                tracer.freeze(part, where)
    result = node.meta.get("val")
    if isinstance(result, (tuple, list)):
        return [torch.full([s if isinstance(s, int) else 1 for s in part.shape], NO_CHANNEL) for part in result]
    if not isinstance(result, Tensor):
        return node.target(*fx.node.map_arg(node.args, tracer.values.__getitem__))
    return torch.full(_shape(node), NO_CHANNEL)


def _convolution(tracer: _Tracer, node: fx.Node) -> Tensor:
    weight, bias = tracer.weight(node, 1), node.args[2] if len(node.args) > 2 else None
    groups = node.args[6] if len(node.args) > 6 else 1
    out_channels, per_group = node.args[1].meta["val"].shape[:2]
    shape = _shape(node)
    tracer.positions[weight] += prod(shape[2:])
    atoms = tracer.channels(node.args[0], 1)
    if groups > 1 and per_group == 1:  # depthwise: channel o of the output is channel o // m of the input
        out = atoms.repeat_interleave(out_channels // groups)
        tracer.place(out, weight, 0, "affine")
    else:
        tied = atoms.view(groups, per_group)
        for block in tied[1:]:  # convolution groups stay equal in width if each loses the same offsets
            tracer.couple(tied[0], block)
        tracer.place(tied[0], weight, 1, "consumer")
        out = tracer.new_atoms(out_channels)
        for block in out.view(groups, -1)[1:]:
            tracer.couple(out.view(groups, -1)[0], block)
        tracer.place(out, weight, 0, "producer")
    if bias is not None:
        tracer.place(out, tracer.graph.tensors[bias], 0, "affine")
    return _spread(out, shape, 1)


def _linear(tracer: _Tracer, node: fx.Node) -> Tensor:
    weight, bias = tracer.weight(node, 1), node.args[2] if len(node.args) > 2 else None
    shape = _shape(node)
    tracer.positions[weight] += prod(shape[1:-1])
    tracer.place(tracer.channels(node.args[0], -1), weight, 1, "consumer")
    out = tracer.new_atoms(shape[-1])
    tracer.place(out, weight, 0, "producer")
    if bias is not None:
        tracer.place(out, tracer.graph.tensors[bias], 0, "affine")
    return _spread(out, shape, len(shape) - 1)


def _batch_norm(tracer: _Tracer, node: fx.Node) -> Tensor:
    atoms = tracer.channels(node.args[0], 1)
    for tensor in node.args[1:5]:
        if tensor is not None:
            tracer.place(atoms, tracer.graph.tensors[tensor], 0, "affine")
    return _spread(atoms, _shape(node), 1)


def _elementwise(tracer: _Tracer, node: fx.Node) -> Tensor:
    labels = torch.tensor(NO_CHANNEL)
    for used in node.all_input_nodes:
        value = tracer.labels(used)
        if isinstance(value, Tensor):
            labels = tracer.couple(labels, value)
    return labels.expand(_shape(node))


def _pool(tracer: _Tracer, node: fx.Node) -> Tensor:
    shape = _shape(node)
    return _spread(tracer.channels(node.args[0], 1), shape, 1) if len(shape) == 4 else _unknown(tracer, node)


def _mean(tracer: _Tracer, node: fx.Node) -> Tensor:
    labels = tracer.labels(node.args[0])
    axes = [axis % labels.dim() for axis in node.args[1]]
    keepdim = node.args[2] if len(node.args) > 2 else False
    thin = _thin(labels)
    low, high = thin.amin(dim=axes, keepdim=keepdim), thin.amax(dim=axes, keepdim=keepdim)
    if not (low == high).all():
        raise _NotUnderstood("averages over channels")
    return high.expand(_shape(node))


def _move(tracer: _Tracer, node: fx.Node) -> object:
    """Operations that only move data are run on the labels themselves."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), tracer.labels)
    return node.target(*args, **kwargs)


def _resample(tracer: _Tracer, node: fx.Node) -> Tensor:
    """As `_move`, for operations that exist for floating-point values only."""
    labels = tracer.labels(node.args[0]).double()
    args = fx.node.map_arg(node.args[1:], tracer.labels)
    return node.target(labels, *args, **node.kwargs).long()


def _pad(tracer: _Tracer, node: fx.Node) -> Tensor:
    labels, widths = tracer.labels(node.args[0]), node.args[1]
    return aten.constant_pad_nd(labels, widths, NO_CHANNEL)


def _number(tracer: _Tracer, node: fx.Node) -> object:
    return node.target(*fx.node.map_arg(node.args, lambda used: tracer.labels(used)))


Handler = Callable[[_Tracer, fx.Node], object]
HANDLERS: dict[str, Handler] = {
    "conv2d": _convolution,
    "linear": _linear,
    "batch_norm": _batch_norm,
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d".split(), _pool),
    "mean": _mean,
    **dict.fromkeys(
        "view reshape flatten unflatten permute transpose unsqueeze squeeze expand cat stack slice select split "
        "split_with_sizes chunk unbind getitem narrow roll flip pixel_shuffle pixel_unshuffle channel_shuffle".split(),
        _move,
    ),
    "upsample_nearest2d": _resample,
    "pad": _pad,
    "constant_pad_nd": _pad,
    **dict.fromkeys("sym_size floordiv sub_int mul_int".split(), _number),
}
