"""From scores and budgets to a plan: which channels go, by score per cost saved.

Pure: reads scores, shapes and costs, touches no weight. A cost (MACs, parameters, milliseconds) is a sum over parts of the
network, each of which depends on the few widths around it.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import inf, isfinite

from torch import Tensor

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import PlanError
from hf_camphive.core.measures import format_cost
from hf_camphive.core.plan import Budget, ChannelCut, ChannelGroup, PrunePlan
from hf_camphive.pruning.planning.costs import CostModel, Costs


def make_plan(
    network: CostModel, scores: Mapping[str, Tensor], targets: Costs | float, config: CampHiVeConfig
) -> PrunePlan:
    """Remove the channels with the least score per cost saved until every budget is met.

    `targets` are the most that "macs" (per image), "params" and "latency" (ms a batch) may come to; a number alone counts
    MACs. The step that is taken next has the least

        score / sum over unmet budgets of min(saved, excess) / (what the budget asks to be saved in all)

    and savings are worked out again after each removal, as the layers around it shrink. `config.threshold` may ask for one
    threshold on the scores alone, or on their percentile in each group, instead. Inside a residual branch a group may be
    emptied: the branch then goes whole. Measured time is a staircase in the widths, and some of a branch's goes
    only with the whole branch: with a latency budget, steps are compared with longer ones and with dropping the branch.
    `scores[group]` is [C], larger is more important.

    Raises `PlanError` where the floors do not let the budgets be met, with the smallest that can be.
    """
    targets = dict(targets) if isinstance(targets, Mapping) else {"macs": targets}
    removal = _GreedyPruner(network, scores, targets, config)
    before = dict(removal.totals)
    if removal.is_done():
        raise PlanError(
            "; ".join(
                f"the network already has {format_cost(cost, before[cost])}, the budget is {_number(cost, target)}; "
                f"lower target_{cost}"
                for cost, target in targets.items()
            )
        )
    while not removal.is_done():
        if not removal.remove_next():
            raise PlanError(_out_of_reach(network, targets, before, removal.totals, config))
    return PrunePlan(
        groups=network.groups,
        branches=network.branches,
        cuts=tuple(removal.cuts()),
        dropped=tuple(removal.dropped),
        criterion=config.scored_by,
        merge=config.merge,
        macs_before=network.macs,
        macs_after=int(removal.totals["macs"]),
        budgets=tuple(Budget(cost, before[cost], target, removal.totals[cost]) for cost, target in targets.items()),
    )


def smallest(network: CostModel, costs: Iterable[str], config: CampHiVeConfig) -> dict[str, float]:
    """What is left of each cost when every group is cut down to its floor."""
    removal = _GreedyPruner(network, {}, dict.fromkeys(costs, 0), config)
    while removal.remove_next():
        pass
    return {cost: removal.totals[cost] for cost in removal.targets}


def _out_of_reach(network: CostModel, targets: Costs, before: Costs, least: Costs, config: CampHiVeConfig) -> str:
    unmet = {cost: target for cost, target in targets.items() if least[cost] > target}
    return "; ".join(
        f"a budget of {format_cost(cost, target)} ({target / before[cost]:.1%}) cannot be met: with "
        f"scope={config.scope!r}, min_channels={config.min_channels} and round_to={config.width_step} the smallest that "
        f"can be reached is {_number(cost, least[cost])} ({least[cost] / before[cost]:.1%}); raise target_{cost}"
        f"{how_to_reach_lower(config)}"
        for cost, target in unmet.items()
    )


def how_to_reach_lower(config: CampHiVeConfig) -> str:
    """What else would let a lower budget be met: the end of an error's message."""
    ways = ["set scope to all"] * (config.scope == "interior")
    ways += ["keep fewer layers"] * bool(config.keep)
    ways += ["raise the ratio limits"] * bool(config.max_ratio < 1 or config.layer_max_ratio)
    return "".join(f", or {way}" for way in ways)


def _number(cost: str, value: float) -> str:
    return format_cost(cost, value).split()[0] if cost != "latency" else format_cost(cost, value)


@dataclass(frozen=True)
class _Step:
    """A removal as {group: channels}: the scores that go with it, and what it saves of each cost."""

    counts: Mapping[str, int]
    lost: float
    saved: Costs


class _GreedyPruner:
    """The state of one greedy descent: how many channels each group still has, and what the next steps would cost."""

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
        self.steps = {name: list(self._steps(name)) for name in self.groups}

    def _rank(self, scores: Mapping[str, Tensor]) -> None:
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
        """Which parts depend on each group and lie in each branch, and whose steps' savings depend on each term."""
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
        return all(self.totals[cost] <= target for cost, target in self.targets.items())

    def remove_next(self) -> bool:
        """Take the cheapest step; False when no group can lose anything more."""
        best, chosen = inf, None
        for steps in self.steps.values():
            for step in steps:
                if (price := self._price(step)) < best:
                    best, chosen = price, step
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
            self.steps[group] = list(self._steps(group))
        return True

    def _price(self, step: _Step) -> float:
        """Score lost per share of the budgets that the step brings; inf where it brings none of them nearer.

        With a global threshold or a percentile it is the highest score that the step passes instead.
        """
        gained = 0.0
        for cost, asked in self.asked.items():
            excess = self.totals[cost] - self.targets[cost]
            if excess > 0:
                gained += min(step.saved[cost], excess) / max(asked, excess)
        if gained == 0:
            return inf
        return step.lost / gained if self.threshold == "adaptive" else step.lost

    def _steps(self, name: str) -> Iterator[_Step]:
        """The group's next removals: down to a multiple of `round_to`, or with its branch to nothing."""
        kept, branch = self.kept[name], self.branch_of_gate.get(name)
        least, jump = max(self.floor[name], 1), self.round_to
        left = (kept - 1) // jump * jump
        lefts = []
        while left >= least and (self.looks_ahead or not lefts):
            lefts.append(left)
            left, jump = left - jump, 2 * jump
        for left in lefts:
            yield self._step({name: kept - left})
        if branch and kept and (self.looks_ahead or not lefts):
            yield self._step({group: self.kept[group] for group in branch.groups if group in self.groups})

    def _step(self, counts: Mapping[str, int]) -> _Step:
        scores = [score for group, count in counts.items() for score in self._next_scores(group, count)]
        return _Step(counts, sum(scores) if self.threshold == "adaptive" else max(scores), self._saved(counts))

    def _next_scores(self, name: str, count: int) -> list[float]:
        gone = self.groups[name].size - self.kept[name]
        return self.score[name][gone : gone + count]

    def _changed(self, counts: Mapping[str, int]) -> tuple[set[int], str | None]:
        """The parts that a removal touches, and the branch that goes with it."""
        changed = set().union(*(self.terms_of[group] for group in counts))
        for group, count in counts.items():
            if count == self.kept[group] and group in self.branch_of_gate:
                module = self.branch_of_gate[group].module
                return changed | self.terms_in[module], module
        return changed, None

    def _saved(self, counts: Mapping[str, int]) -> Costs:
        """What a removal saves of each cost at the present widths."""
        changed, module = self._changed(counts)
        kept = self.kept
        self.kept = kept | {group: kept[group] - count for group, count in counts.items()}
        dropped = [*self.dropped, module]
        saved = dict.fromkeys(self.totals, 0)
        for i in changed:
            cost, term = self.terms[i]
            saved[cost] += self.values[i] - term.at(self.kept, dropped)
        self.kept = kept
        return saved

    def cuts(self) -> Iterator[ChannelCut]:
        for name, group in self.groups.items():
            if self.kept[name] < group.size:
                gone = group.size - self.kept[name]
                yield ChannelCut(name, tuple(sorted(self.ranking[name][gone:])))


def _nothing_to_prune(groups: Iterable[ChannelGroup], config: CampHiVeConfig) -> str:
    reasons = "; ".join(f"{group.name}: {group.frozen or 'kept or out of scope'}" for group in groups)
    advice = "keep fewer layers" if config.keep else "choose another model"
    return f"no channel group of this network can be pruned ({reasons or 'it has none'}); {advice}"
