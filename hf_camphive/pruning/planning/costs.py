"""The costs of a network at given channel counts, as sums of terms that each depend on a few widths."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.plan import Branch, ChannelGroup
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.pruning.planning.limits import floors

CostName = Literal["macs", "params", "latency"]
Costs = Mapping[str, float]
"""MACs per image, number of parameters, milliseconds per batch, by `CostName`."""


@dataclass(frozen=True)
class Width:
    """Describe a number of channels: `fixed` + sum over `groups` of (channels kept) * (positions per channel)."""

    fixed: int
    groups: tuple[tuple[str, int], ...] = ()

    def at(self, kept: Mapping[str, int]) -> int:
        """Return this width when `kept` channels of each group remain."""
        return self.fixed + sum(kept[group] * repeat for group, repeat in self.groups)


@dataclass(frozen=True)
class CostTerm:
    """Describe the cost of one weight or operation as a function of its widths.

    It counts only while the residual branch `branch` exists; with `replaces`, only after that branch was dropped.
    """

    widths: tuple[Width, ...]
    cost: Callable[..., float]
    branch: str | None = None
    replaces: bool = False

    def at(self, kept: Mapping[str, int], dropped: Iterable[str]) -> float:
        """Return the cost when `kept` channels of each group remain and the branches `dropped` are removed."""
        if self.branch is not None and (self.branch in dropped) != self.replaces:
            return 0
        return self.cost(*(width.at(kept) for width in self.widths))


@dataclass(frozen=True)
class CostModel:
    """Hold what planning needs of a network: groups, droppable branches, the groups between blocks, and costs.

    MACs per image = sum over weights of positions[weight] * product of shapes[weight]. `exterior` names the groups
    between blocks, `parameters` the tensors that count as parameters; `operations` are the terms of the latency.
    `dense_sizes` are the widths before the first cycle of groups whose width differs from the present one.
    """

    groups: tuple[ChannelGroup, ...]
    branches: tuple[Branch, ...]
    exterior: frozenset[str]
    positions: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    parameters: frozenset[str] = frozenset()
    operations: tuple[CostTerm, ...] = ()
    dense_sizes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, analysis: NetworkAnalysis, dense_sizes: Mapping[str, int] | None = None) -> "CostModel":
        """Return the cost model of an analysed network, without its latency."""
        return cls(
            analysis.groups,
            analysis.branches,
            analysis.exterior,
            analysis.trace.positions,
            analysis.shapes,
            analysis.parameters,
            dense_sizes=dense_sizes or {},
        )

    @property
    def macs(self) -> int:
        """Return the MACs per image at full width."""
        return sum(count * prod(self.shapes[name]) for name, count in self.positions.items())

    def floors(self, config: CampHiVeConfig) -> dict[str, int]:
        """Return the fewest channels of each group that may change (`limits.floors`).

        Raises:
            ConfigError: A pattern of the config matches no layer.
        """
        return floors(self.groups, self.branches, self.exterior, self.dense_sizes, config)

    def costs(self) -> dict[str, float]:
        """Return the network's present costs, without those that are unknown (0)."""
        kept = {group.name: group.size for group in self.groups}
        found = {cost: sum(term.at(kept, ()) for term in self.terms(cost)) for cost in ("macs", "params", "latency")}
        return {cost: value for cost, value in found.items() if value}

    def terms(self, cost: str) -> tuple[CostTerm, ...]:
        """Return the terms whose sum is this cost."""
        if cost == "latency":
            return self.operations
        if cost == "macs":
            return tuple(self._weights(self.positions))
        return tuple(self._weights(dict.fromkeys(self.parameters, 1))) + tuple(self._constants())

    def _weights(self, counts: Mapping[str, int]) -> Iterator[CostTerm]:
        """Yield the term of each weight: `counts[weight]` times the product of its sizes."""
        widths = axis_widths(self.groups, self.shapes)
        branch = {tensor: branch.module for branch in self.branches for tensor in branch.tensors}
        for name, count in counts.items():
            axes = tuple(widths.get((name, axis), Width(size)) for axis, size in enumerate(self.shapes[name]))
            yield CostTerm(axes, lambda *sizes, count=count: count * prod(sizes), branch.get(name))

    def _constants(self) -> Iterator[CostTerm]:
        """Yield the terms of the constants [C] that dropped branches leave on the residual stream, which are parameters."""
        widths = axis_widths(self.groups, self.shapes)
        for branch in self.branches:
            streams = (stream_width(branch, widths),)
            yield CostTerm(streams, lambda *sizes: sum(sizes), branch.module, replaces=True)


def stream_width(branch: Branch, widths: Mapping[tuple[str, int], Width]) -> Width:
    """Return the width of the residual stream that a branch adds to, or a width of 0 if it is unknown.

    It is the output width of a tensor of the branch whose channels belong to no group inside the branch.
    """
    inner = set(branch.groups)
    for tensor in branch.tensors:
        width = widths.get((tensor, 0))
        if width is not None and inner.isdisjoint(group for group, _ in width.groups):
            return width
    return Width(0)


def axis_widths(groups: Iterable[ChannelGroup], shapes: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], Width]:
    """Return the width of every tensor axis that carries channels, by (tensor, axis)."""
    carried: dict[tuple[str, int], dict[str, int]] = defaultdict(dict)
    fixed: dict[tuple[str, int], int] = {}
    for group in groups:
        for slot in group.slots:
            axis, repeat = (slot.tensor, slot.axis), len(slot.index) // group.size
            if slot.tensor in shapes:
                carried[axis][group.name] = carried[axis].get(group.name, 0) + repeat
                fixed[axis] = fixed.get(axis, shapes[slot.tensor][slot.axis]) - len(slot.index)
    return {axis: Width(fixed[axis], tuple(found.items())) for axis, found in carried.items()}
