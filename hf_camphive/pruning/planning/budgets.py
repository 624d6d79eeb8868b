"""A run's budgets over its cycles: their absolute values, the targets of the next cycle, and whether they are met.

Pure: reads costs, earlier plans and settings.
"""

from collections.abc import Sequence
from typing import cast

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import PlanError
from hf_camphive.core.measures import format_cost
from hf_camphive.core.plan import Budget, ChannelGroup, PrunePlan
from hf_camphive.pruning.planning.costs import CostModel, CostName, Costs
from hf_camphive.pruning.planning.greedy import how_to_reach_lower, smallest


def absolute(budgets: Costs, dense: Costs) -> dict[str, float]:
    """Convert budgets that are shares of the `dense` network's costs to MACs, parameters or milliseconds.

    Values below 1 are shares, as is 1 for all costs but latency, where it is one millisecond.
    """
    return {
        cost: target * dense[cost] if target < 1 or (target == 1 and cost != "latency") else target
        for cost, target in budgets.items()
    }


def next_targets(network: CostModel, earlier: Sequence[PrunePlan], config: CampHiVeConfig) -> dict[str, float]:
    """Return the most that each budgeted cost may be after the next cycle.

    With n cycles left, each reduces a cost to (target / now)^(1/n) of its present value. `earlier` are the plans of the
    cycles before.

    Raises:
        PlanError: A budget is no less than the dense network's cost, or less than the floors allow.
    """
    now = network.costs()
    dense: dict[str, float] = {b.cost: b.before for b in earlier[0].budgets} if earlier else now
    targets = absolute(config.budgets, dense)
    _require_in_reach(targets, dense, smallest(network, targets, config), config)
    to_go = max(1, config.cycles - len(earlier))
    return {
        cost: target if to_go == 1 or now[cost] <= target else now[cost] * (target / now[cost]) ** (1 / to_go)
        for cost, target in targets.items()
    }


def overall_budgets(plans: Sequence[PrunePlan], config: CampHiVeConfig) -> tuple[Budget, ...]:
    """Return each budget over all cycles: the cost before the first, the target, and the cost under the last plan."""
    if not plans or not plans[0].budgets:
        return ()
    dense: dict[str, float] = {budget.cost: budget.before for budget in plans[0].budgets}
    after: dict[str, float] = {budget.cost: budget.after for budget in plans[-1].budgets}
    targets = absolute(config.budgets, dense)
    return tuple(Budget(cast(CostName, cost), dense[cost], target, after[cost]) for cost, target in targets.items())


def is_finished(plans: Sequence[PrunePlan], config: CampHiVeConfig) -> bool:
    """Return True when every cycle has run, or every budget is met already.

    Dropping a whole branch can save more than a cycle's share.
    """
    met = bool(plans) and all(budget.after <= budget.target for budget in overall_budgets(plans, config))
    return len(plans) >= config.cycles or met


def dense_sizes(groups: Sequence[ChannelGroup], earlier: Sequence[PrunePlan]) -> dict[str, int]:
    """Return the width of each group before the first cycle, by the group's present name.

    Groups are matched by the tensor axis of their first slot, since the layer that names a group may have been removed.
    """
    dense = earlier[0].groups if earlier else groups
    size_at = {(slot.tensor, slot.axis): group.size for group in dense for slot in group.slots}
    first = {group.name: (group.slots[0].tensor, group.slots[0].axis) for group in groups}
    return {name: size_at[axis] for name, axis in first.items() if axis in size_at}


def _require_in_reach(targets: Costs, dense: Costs, least: Costs, config: CampHiVeConfig) -> None:
    """Check that each target lies between the least reachable cost and the dense network's.

    Raises:
        PlanError: A target is no less than the dense network's cost, or less than the least reachable one.
    """
    for cost, target in targets.items():
        if target >= dense[cost]:
            raise PlanError(
                f"the budget of {format_cost(cost, target)} is no less than the network's "
                f"{format_cost(cost, dense[cost])}; lower it"
            )
        if least[cost] > target:
            raise PlanError(
                f"a budget of {format_cost(cost, target)} ({target / dense[cost]:.1%}) is below the smallest that the "
                f"floors allow, {format_cost(cost, least[cost])} ({least[cost] / dense[cost]:.1%}); raise target_{cost}"
                + how_to_reach_lower(config)
            )
