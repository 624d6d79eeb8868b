"""From scores and budgets to a plan: remove the channels with the least score per cost saved.

Pure: reads scores, shapes and costs, and no weights. A cost (MACs, parameters, milliseconds) is a sum of terms, each a
function of a few widths (`costs.py`).
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import cast

from torch import Tensor

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import PlanError
from hf_camphive.core.measures import format_cost
from hf_camphive.core.plan import Budget, ChannelCut, ChannelGroup, PrunePlan
from hf_camphive.pruning.planning.costs import CostModel, CostName, Costs


def make_plan(
    network: CostModel, scores: Mapping[str, Tensor], targets: Costs | float, config: CampHiVeConfig
) -> PrunePlan:
    """Remove the channels with the least score per cost saved until every budget is met.

    `targets` are upper bounds of "macs" (per image), "params" and "latency" (ms per batch); a number alone bounds the
    MACs. `scores[group]` is [C], larger for more important channels. Each step takes the removal with the least

        price = sum of scores / sum over unmet budgets of min(saved, excess) / (saving asked for in all)

    where excess is what a cost still exceeds its budget by. Savings are computed again after each removal, since the
    layers around it have become narrower. With `config.threshold` "global" or "percentile" the price is instead the
    highest score, or the highest percentile of a score in its group, among the removed channels.

    A group inside a residual branch may be emptied, which drops the branch. Measured time is a staircase in the widths,
    and some of a branch's time is saved only by dropping it: with a latency budget, each removal competes with longer
    ones and with dropping the branch.

    Raises:
        PlanError: The network already meets all budgets, the floors do not allow them (the message names the least
            reachable costs), no group can be pruned, or a score is not finite.
    """
    targets = dict(targets) if isinstance(targets, Mapping) else {"macs": targets}
    pruner = _GreedyPruner(network, scores, targets, config)
    before = dict(pruner.totals)
    if pruner.is_done():
        raise PlanError(
            "; ".join(
                f"the network already has {format_cost(cost, before[cost])}, the budget is {_number(cost, target)}; "
                f"lower target_{cost}"
                for cost, target in targets.items()
            )
        )
    while not pruner.is_done():
        if not pruner.remove_next():
            raise PlanError(_out_of_reach(network, targets, before, pruner.totals, config))
    return PrunePlan(
        groups=network.groups,
        branches=network.branches,
        cuts=tuple(pruner.cuts()),
        dropped=tuple(pruner.dropped),
        criterion=config.scored_by,
        merge=config.merge,
        macs_before=network.macs,
        macs_after=int(pruner.totals["macs"]),
        budgets=tuple(
            Budget(cast(CostName, cost), before[cost], target, pruner.totals[cost]) for cost, target in targets.items()
        ),
    )


def smallest(network: CostModel, costs: Iterable[str], config: CampHiVeConfig) -> dict[str, float]:
    """Return what remains of each cost when every group is cut down to its floor.

    Raises:
        PlanError: No group can be pruned.
    """
    pruner = _GreedyPruner(network, {}, dict.fromkeys(costs, 0), config)
    while pruner.remove_next():
        pass
    return {cost: pruner.totals[cost] for cost in pruner.targets}


def _out_of_reach(network: CostModel, targets: Costs, before: Costs, least: Costs, config: CampHiVeConfig) -> str:
    """Return the message of the error that the floors do not allow these targets."""
    unmet = {cost: target for cost, target in targets.items() if least[cost] > target}
    return "; ".join(
        f"a budget of {format_cost(cost, target)} ({target / before[cost]:.1%}) cannot be met: with "
        f"scope={config.scope!r}, min_channels={config.min_channels} and round_to={config.width_step} the smallest that "
        f"can be reached is {_number(cost, least[cost])} ({least[cost] / before[cost]:.1%}); raise target_{cost}"
        f"{how_to_reach_lower(config)}"
        for cost, target in unmet.items()
    )


def how_to_reach_lower(config: CampHiVeConfig) -> str:
    """Return the end of an error message: settings whose change allows a lower budget."""
    ways = ["set scope to all"] * (config.scope == "interior")
    ways += ["keep fewer layers"] * bool(config.keep)
    ways += ["raise the ratio limits"] * bool(config.max_ratio < 1 or config.layer_max_ratio)
    return "".join(f", or {way}" for way in ways)


def _number(cost: str, value: float) -> str:
    """Format a cost; MACs and parameters without their unit."""
    return format_cost(cost, value).split()[0] if cost != "latency" else format_cost(cost, value)


@dataclass(frozen=True)
class _Removal:
    """Describe a removal that may be made next: `counts` channels of each group, the `score` lost, the costs `saved`."""

    counts: Mapping[str, int]
    score: float
    saved: Costs


class _GreedyPruner:
    """Hold the state of one greedy pruning: channels kept of each group, costs, and the removals that may come next.

    Channels of a group are removed in ascending order of score, so that a count of kept channels describes which.

    Raises:
        PlanError: No group can be pruned, or a score is not finite.
    """

    def __init__(
        self, network: CostModel, scores: Mapping[str, Tensor], targets: Costs, config: CampHiVeConfig
    ) -> None:
        self.targets, self.round_to, self.threshold = targets, config.width_step, config.threshold
        self.looks_ahead = "latency" in targets
        self.floor = network.floors(config)
        self.groups = {group.name: group for group in network.groups if group.name in self.floor}
        if not self.groups:
            raise PlanError(_nothing_to_prune(network.groups, config))
        self.kept = {group.name: group.size for group in network.groups}
        self._rank(scores)
        gated = [branch for branch in network.branches if any(self.floor.get(gate) == 0 for gate in branch.gates)]
        self.branch_of_gate = {gate: branch for branch in gated for gate in branch.gates if gate in self.floor}
        self.dropped: list[str] = []
        self.terms = [(cost, term) for cost in {"macs": 0, **targets} for term in network.terms(cost)]
        self.values = [term.at(self.kept, ()) for _, term in self.terms]
        self.totals: dict[str, float] = dict.fromkeys(("macs", *targets), 0)
        for (cost, _), value in zip(self.terms, self.values):
            self.totals[cost] += value
        self.asked = {cost: self.totals[cost] - target for cost, target in targets.items()}
        self._index_terms()
        self.removals = {name: list(self._removals(name)) for name in self.groups}

    def _rank(self, scores: Mapping[str, Tensor]) -> None:
        """Sort each group's channels by score, ascending; groups without scores count as all 0.

        Raises:
            PlanError: A score is not finite.
        """
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

    def _index_terms(self) -> None:
        """Index which terms depend on each group and lie in each branch, and which groups' removals depend on each term."""
        self.terms_of: dict[str, set[int]] = defaultdict(set)
        self.terms_in: dict[str, set[int]] = defaultdict(set)
        for i, (_, term) in enumerate(self.terms):
            for width in term.widths:
                for group, _ in width.groups:
                    self.terms_of[group].add(i)
            if term.branch is not None:
                self.terms_in[term.branch].add(i)
        self.affected: dict[int, set[str]] = defaultdict(set)
        for name in self.groups:
            read = set(self.terms_of[name])
            if branch := self.branch_of_gate.get(name):
                read |= self.terms_in[branch.module].union(*(self.terms_of[group] for group in branch.groups))
            for i in read:
                self.affected[i].add(name)

    def is_done(self) -> bool:
        """Return True when every budget is met."""
        return all(self.totals[cost] <= target for cost, target in self.targets.items())

    def remove_next(self) -> bool:
        """Make the removal with the least price; return False if none brings a budget nearer."""
        best, chosen = inf, None
        for removals in self.removals.values():
            for removal in removals:
                if (price := self._price(removal)) < best:
                    best, chosen = price, removal
        if chosen is None:
            return False
        changed, module = self._changed(chosen.counts)
        for group, count in chosen.counts.items():
            self.kept[group] -= count
        if module:
            self.dropped.append(module)
        for i in changed:
            cost, term = self.terms[i]
            value = term.at(self.kept, self.dropped)
            self.totals[cost] += value - self.values[i]
            self.values[i] = value
        for group in sorted(set().union(*(self.affected[i] for i in changed))):
            self.removals[group] = list(self._removals(group))
        return True

    def _price(self, removal: _Removal) -> float:
        """Return the price of a removal (`make_plan`); inf if it brings no budget nearer."""
        gained = 0.0
        for cost, asked in self.asked.items():
            excess = self.totals[cost] - self.targets[cost]
            if excess > 0:
                gained += min(removal.saved[cost], excess) / max(asked, excess)
        if gained == 0:
            return inf
        return removal.score / gained if self.threshold == "adaptive" else removal.score

    def _removals(self, name: str) -> Iterator[_Removal]:
        """Yield the removals that the group may lose next: down to multiples of `round_to`, and with its whole branch.

        With a latency budget these are steps of 1, 2, 4, ... times `round_to`, and the branch; without, the first step,
        or the branch where no step is left.
        """
        kept, branch = self.kept[name], self.branch_of_gate.get(name)
        least, jump = max(self.floor[name], 1), self.round_to
        left = (kept - 1) // jump * jump
        lefts: list[int] = []
        while left >= least and (self.looks_ahead or not lefts):
            lefts.append(left)
            left, jump = left - jump, 2 * jump
        for left in lefts:
            yield self._removal({name: kept - left})
        if branch and kept and (self.looks_ahead or not lefts):
            yield self._removal({group: self.kept[group] for group in branch.groups if group in self.groups})

    def _removal(self, counts: Mapping[str, int]) -> _Removal:
        """Return the removal of the next `counts` channels, with their sum of scores or, with thresholds, the highest."""
        scores = [score for group, count in counts.items() for score in self._next_scores(group, count)]
        return _Removal(counts, sum(scores) if self.threshold == "adaptive" else max(scores), self._saved(counts))

    def _next_scores(self, name: str, count: int) -> list[float]:
        """Return the scores of the group's next `count` channels to be removed."""
        gone = self.groups[name].size - self.kept[name]
        return self.score[name][gone : gone + count]

    def _changed(self, counts: Mapping[str, int]) -> tuple[set[int], str | None]:
        """Return the terms that a removal changes, and the module of the branch that it drops, or None."""
        changed = set().union(*(self.terms_of[group] for group in counts))
        for group, count in counts.items():
            if count == self.kept[group] and group in self.branch_of_gate:
                module = self.branch_of_gate[group].module
                return changed | self.terms_in[module], module
        return changed, None

    def _saved(self, counts: Mapping[str, int]) -> Costs:
        """Return what a removal saves of each cost at the present widths."""
        changed, module = self._changed(counts)
        kept = self.kept
        self.kept = kept | {group: kept[group] - count for group, count in counts.items()}
        dropped = [*self.dropped, module] if module else self.dropped
        saved: dict[str, float] = dict.fromkeys(self.totals, 0)
        for i in changed:
            cost, term = self.terms[i]
            saved[cost] += self.values[i] - term.at(self.kept, dropped)
        self.kept = kept
        return saved

    def cuts(self) -> Iterator[ChannelCut]:
        """Yield the cut of each group that lost channels."""
        for name, group in self.groups.items():
            if self.kept[name] < group.size:
                gone = group.size - self.kept[name]
                yield ChannelCut(name, tuple(sorted(self.ranking[name][gone:])))


def _nothing_to_prune(groups: Iterable[ChannelGroup], config: CampHiVeConfig) -> str:
    """Return the message of the error that every group must stay whole."""
    reasons = "; ".join(f"{group.name}: {group.frozen or 'kept or out of scope'}" for group in groups)
    advice = "keep fewer layers" if config.keep else "choose another model"
    return f"no channel group of this network can be pruned ({reasons or 'it has none'}); {advice}"
