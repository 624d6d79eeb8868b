"""From scores and a budget to a plan: which channels go, by score per multiply-accumulate saved.

Pure: reads scores and shapes, touches no weight.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf, isfinite, prod

from torch import Tensor

from .config import CampHiVeConfig
from .errors import PlanError
from .plan import Branch, ChannelCut, ChannelGroup, PrunePlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Budgeted:
    """What planning knows of a network: its groups, droppable branches, those groups that lie between blocks, and its weights' MACs.

    MACs per image = sum over weights of positions[weight] * product of shapes[weight].
    """

    groups: tuple[ChannelGroup, ...]
    branches: tuple[Branch, ...]
    exterior: frozenset[str]
    positions: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def macs(self) -> int:
        return sum(count * prod(self.shapes[name]) for name, count in self.positions.items())


def make_plan(network: Budgeted, scores: Mapping[str, Tensor], target_macs: int, config: CampHiVeConfig) -> PrunePlan:
    """Remove the channels with the least score per MAC saved until at most `target_macs` (per image) are left.

    score / MACs is the loss that a removal is expected to cost for what it saves; what it saves is worked out again
    after each removal, as the layers around it shrink. `config.threshold` may ask for one threshold on the scores alone,
    or on their percentile in each group, instead. Inside a residual branch a group may be emptied: the branch then
    goes whole. `scores[group]` is [C], larger is more important.

    Raises `PlanError` where the floors do not let the budget be met, with the smallest that can be.
    """
    removal = _Removal(network, scores, config)
    if removal.macs <= target_macs:
        raise PlanError(
            f"the network already has {removal.macs:,} MACs per image, the budget is {target_macs:,}; lower target_macs"
        )
    while removal.macs > target_macs:
        if not removal.remove_next():
            raise PlanError(
                f"a budget of {target_macs:,} MACs per image ({target_macs / network.macs:.1%}) cannot be met: with "
                f"scope={config.scope!r}, min_channels={config.min_channels} and round_to={config.round_to} the smallest that "
                f"can be reached is {removal.macs:,} ({removal.macs / network.macs:.1%}); raise target_macs"
                + (", or set scope to all" if config.scope == "interior" else "")
            )
    return PrunePlan(
        groups=network.groups,
        branches=network.branches,
        cuts=tuple(removal.cuts()),
        dropped=tuple(removal.dropped),
        criterion=config.criterion,
        merge=config.merge,
        macs_before=network.macs,
        macs_after=removal.macs,
    )


def smallest_macs(network: Budgeted, config: CampHiVeConfig) -> int:
    """MACs per image that are left when every group is cut down to its floor."""
    removal = _Removal(network, {}, config)
    while removal.remove_next():
        pass
    return removal.macs


class _Removal:
    """The state of one greedy descent: how many channels each group still has, and what the next step would cost."""

    def __init__(self, network: Budgeted, scores: Mapping[str, Tensor], config: CampHiVeConfig) -> None:
        self.network, self.round_to, self.threshold = network, config.round_to, config.threshold
        self.groups = {
            group.name: group
            for group in network.groups
            if not group.frozen and (config.scope == "all" or group.name not in network.exterior)
        }
        if not self.groups:
            raise PlanError(_nothing_to_prune(network.groups))
        self.kept = {name: group.size for name, group in self.groups.items()}
        self.ranking: dict[str, list[int]] = {}
        self.score: dict[str, list[float]] = {}
        for name, group in self.groups.items():
            values = scores[name].double().tolist() if name in scores else [0.0] * group.size
            if not all(map(isfinite, values)):
                raise PlanError(
                    f"the scores of group {name!r} are not all numbers; look for NaN in the network's weights or the "
                    "calibration images, or choose another criterion"
                )
            self.ranking[name] = sorted(range(group.size), key=values.__getitem__)
            self.score[name] = [values[c] for c in self.ranking[name]]
            if self.threshold == "percentile":
                self.score[name] = [(rank + 1) / group.size for rank in range(group.size)]
        self.branch_of_gate = {gate: branch for branch in network.branches for gate in branch.gates}
        self.floor = {
            name: 0 if name in self.branch_of_gate else min(config.min_channels, self.kept[name])
            for name in self.groups
        }
        self.dropped: list[str] = []
        self.sizes = {name: list(network.shapes[name]) for name in network.positions}
        self.reads = {name: _axes(group, network.positions) for name, group in self.groups.items()}
        readers = defaultdict(set)
        for name, axes in self.reads.items():
            for tensor in axes:
                readers[tensor].add(name)
        self.neighbours = {
            name: set().union({name}, *(readers[tensor] for tensor in axes)) for name, axes in self.reads.items()
        }
        self.macs = network.macs
        self.steps = {name: self._step(name) for name in self.groups}

    def remove_next(self) -> bool:
        """Take the cheapest step; False when no group can lose anything more."""
        name = min(self.steps, key=lambda name: self.steps[name][0])
        ratio, step = self.steps[name]
        if ratio == inf:
            return False
        self.macs -= self._saved(step)
        touched: set[str] = set()
        for group, count in step.items():
            self.kept[group] -= count
            touched |= self.neighbours[group]
            for tensor, axes in self.reads[group].items():
                for axis, repeat in axes.items():
                    self.sizes[tensor][axis] -= count * repeat
            if self.kept[group] == 0 and group in self.branch_of_gate:
                module = self.branch_of_gate[group].module
                if module not in self.dropped:
                    self.dropped.append(module)
        for group in touched:
            self.steps[group] = self._step(group)
        return True

    def _step(self, name: str) -> tuple[float, dict[str, int]]:
        """The group's next removal as {group: channels}, and its price (inf where there is none).

        That is the score per MAC saved, or with a global threshold or a percentile the highest that must be passed.
        """
        kept = self.kept[name]
        left = (kept - 1) // self.round_to * self.round_to
        if left < self.floor[name] or kept == 0:
            return inf, {}
        step = {name: kept - left}
        if left == 0:
            step = {group: self.kept[group] for group in self.branch_of_gate[name].groups if group in self.kept}
        saved = self._saved(step)
        if saved == 0:
            return inf, {}
        scores = [score for group, count in step.items() for score in self._next_scores(group, count)]
        return (sum(scores) / saved if self.threshold == "adaptive" else max(scores)), step

    def _next_scores(self, name: str, count: int) -> list[float]:
        gone = self.groups[name].size - self.kept[name]
        return self.score[name][gone : gone + count]

    def _saved(self, step: Mapping[str, int]) -> int:
        """MACs per image that a removal saves at the present widths."""
        change: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for group, count in step.items():
            for tensor, axes in self.reads[group].items():
                for axis, repeat in axes.items():
                    change[tensor][axis] += count * repeat
        saved = 0
        for tensor, axes in change.items():
            size = self.sizes[tensor]
            after = [length - axes.get(axis, 0) for axis, length in enumerate(size)]
            saved += self.network.positions[tensor] * (prod(size) - prod(after))
        return saved

    def cuts(self) -> Iterable[ChannelCut]:
        for name, group in self.groups.items():
            if self.kept[name] < group.size:
                gone = group.size - self.kept[name]
                yield ChannelCut(name, tuple(sorted(self.ranking[name][gone:])))


def _axes(group: ChannelGroup, counted: Iterable[str]) -> dict[str, dict[int, int]]:
    """Weights that carry the group: {tensor: {axis: positions per channel}}."""
    axes: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for slot in group.slots:
        if slot.tensor in counted:
            axes[slot.tensor][slot.axis] += len(slot.index) // group.size
    return axes


def _nothing_to_prune(groups: Iterable[ChannelGroup]) -> str:
    reasons = "; ".join(f"{group.name}: {group.frozen}" for group in groups)
    return f"no channel group of this network can be pruned ({reasons or 'it has none'}); choose another model"


def cyclic_pairs(scores: Tensor, keep: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """(removed, receiver) pairs: the r-th removed channel goes to kept channel r mod K, both by descending score.

    CAMP-HiVe, arXiv:2511.06265, cyclic pairing. Deviation: the authors' code pairs by position in memory; we pair by
    rank, as the paper says. `scores` is [C].
    """
    kept = set(keep)
    order = sorted(range(len(scores)), key=lambda c: (-float(scores[c]), c))
    receivers = [c for c in order if c in kept]
    removed = [c for c in order if c not in kept]
    if not receivers:
        return ()
    return tuple((c, receivers[r % len(receivers)]) for r, c in enumerate(removed))
