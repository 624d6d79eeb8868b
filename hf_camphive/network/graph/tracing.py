"""Find the channels that must be removed together, by following every channel through the network.

Each element of each value has a label: the channel that it belongs to, an *atom* (`labels.py`). Convolutions and linear layers
read atoms and create new ones, operations that only move data are run on the labels themselves, and element-wise
operations couple the atoms of their operands (`handlers.py`). An operation that is not supported freezes the atoms that it
reads, with the reason. No weight is read or changed.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from hf_camphive.core.plan import ChannelGroup, Role, Slot
from hf_camphive.network.graph.handlers import follow
from hf_camphive.network.graph.labels import NO_CHANNEL, Labels, Place, thin
from hf_camphive.network.graph.program import TracedProgram, export_graph, operation


@dataclass(frozen=True)
class Count:
    """A number of channels that occurs in the operations of `module`.

    `kind` is "written" if the number is an argument of an operation, "input" if it is the size of a value that comes from
    outside the module, else "size". Each of the `lines` maps groups to the channels that it holds, one entry for each
    position. After a cut, the number is that of the line that keeps the most.
    """

    module: str
    number: int
    lines: tuple[Mapping[str, tuple[int, ...]], ...]
    kind: str

    def after(self, keep: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number after a cut in which each group keeps the given channels."""
        kept = {name: set(keep[name]) for line in self.lines for name in line}
        gone = [sum(c not in kept[name] for name, channels in line.items() for c in channels) for line in self.lines]
        return self.number - min(gone)


@dataclass(frozen=True)
class Trace:
    """A network's graph, its channel groups in forward order, and the cost of its weights.

    `positions` is the number of multiply-accumulates per image for each element of a convolution's or linear layer's
    weight: MACs = sum over weights of positions * weight.numel(). `sums` maps each addition to the names of the groups
    whose channels it adds; `counts` are the numbers of channels that change with the widths.
    """

    graph: TracedProgram
    groups: tuple[ChannelGroup, ...]
    positions: Mapping[str, int]
    sums: Mapping[str, frozenset[str]]
    input_size: tuple[int, int, int]
    counts: tuple[Count, ...] = ()


def trace_network(net: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    """Find the channel groups of a network for images of `input_size` (C, H, W).

    Raises:
        ModelError: The network cannot be exported (`export_graph`).
    """
    graph = export_graph(net, input_size)
    labels = Labels(graph)
    for node in graph.operations:
        labels.values[node] = follow(labels, node)
        labels.count_sizes(node)
    labels.freeze(labels.of(graph.logits), "output of the network")
    labels.settle()
    groups, channels = _channel_groups(labels)
    sums = {node.name: _groups_at(labels, node, channels) for node in graph.operations if operation(node) == "add"}
    return Trace(graph, groups, dict(labels.positions), sums, tuple(input_size), _counts(labels, channels))


def _channel_groups(labels: Labels) -> tuple[tuple[ChannelGroup, ...], dict[int, tuple[str, int]]]:
    """Return the channel groups, and {root atom of a channel: (name of its group, its number in the group)}.

    Coupled atoms form one channel. Channels that occur at the same axes of the same tensors, equally often, form one group.
    """
    channels, reasons = _joined_channels(labels)
    families: dict[tuple, list[int]] = defaultdict(list)
    for root, places in channels.items():
        counts = Counter(place[:3] for place in set(places))
        families[frozenset(counts.items()), reasons.get(root)].append(root)
    groups: list[ChannelGroup] = []
    numbers: dict[int, tuple[str, int]] = {}
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
            numbers |= {root: (name, number) for number, root in enumerate(roots)}
            groups.append(ChannelGroup(name, len(roots), slots, reason))
    return tuple(groups), numbers


def _joined_channels(labels: Labels) -> tuple[dict[int, list[Place]], dict[int, str]]:
    """Return the places of each channel, and the reasons why channels are frozen, by the root atom of the channel."""
    channels: dict[int, list[Place]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for atom in range(len(labels.parent)):
        root = labels.root(atom)
        channels[root] += labels.places[atom]
        if atom in labels.reasons:
            reasons.setdefault(root, labels.reasons[atom])
    return channels, reasons


def _groups_at(labels: Labels, node: fx.Node, channels: Mapping[int, tuple[str, int]]) -> frozenset[str]:
    """Return the names of the groups whose channels a value holds."""
    found = labels.values[node]
    atoms = torch.unique(thin(found)).tolist() if isinstance(found, Tensor) else []
    roots = {labels.root(atom) for atom in atoms if atom != NO_CHANNEL}
    return frozenset(channels[root][0] for root in roots if root in channels)


def _counts(labels: Labels, channels: Mapping[int, tuple[str, int]]) -> tuple[Count, ...]:
    """Return the recorded numbers of channels as counts over channel groups, without duplicates.

    `channels` maps the root atom of each channel to its group and its number in the group.
    """
    found: dict[tuple, Count] = {}
    for literal in labels.literals:
        roots = torch.unique(labels.roots(literal.lines), dim=0)
        key = (literal.module, literal.kind, literal.number, roots.numpy().tobytes())
        if key in found:
            continue
        lines = []
        for line in roots.tolist():
            members: dict[str, list[int]] = defaultdict(list)
            for root in line:
                if root in channels:
                    members[channels[root][0]].append(channels[root][1])
            lines.append({name: tuple(numbers) for name, numbers in members.items()})
        found[key] = Count(literal.module, literal.number, tuple(lines), literal.kind)
    return tuple(found.values())


def _group_name(slots: tuple[Slot, ...], groups: list[ChannelGroup]) -> str:
    """Return the name of the first producer's module, with a suffix "#2", "#3", ... if a group has that name already."""
    first = next((slot for slot in slots if slot.role == "producer"), slots[0])
    name = base = first.tensor.removesuffix(".weight")
    taken = {group.name for group in groups}
    count = 1
    while name in taken:
        count += 1
        name = f"{base}#{count}"
    return name
