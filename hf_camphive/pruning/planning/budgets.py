"""A run's budgets over its cycles: what each comes to, what the next cycle should leave, what has been reached.

Pure: reads costs, earlier plans and settings.
"""

from collections.abc import Sequence

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import PlanError
from hf_camphive.core.measures import format_cost
from hf_camphive.core.plan import Budget, ChannelGroup, PrunePlan
from hf_camphive.pruning.planning.costs import CostModel, Costs
from hf_camphive.pruning.planning.greedy import how_to_reach_lower, smallest


def absolute(budgets: Costs, dense: Costs) -> dict[str, float]:
    """What budgets come to for a network that costs `dense`: those below 1 are shares of it, as is 1 but for latency."""
    return {
        cost: target * dense[cost] if target < 1 or (target == 1 and cost != "latency") else target
        for cost, target in budgets.items()
    }


def next_targets(network: CostModel, earlier: Sequence[PrunePlan], config: CampHiVeConfig) -> dict[str, float]:
    """The costs after the next cycle: with n cycles to go each leaves (target / now)^(1/n) of what there is now.

    Raises `PlanError` on a budget that asks for nothing, or for more than the floors allow.
    """
    now = network.costs()
    dense = {budget.cost: budget.before for budget in earlier[0].budgets} if earlier else now
    targets = absolute(config.budgets, dense)
    _require_in_reach(targets, dense, smallest(network, targets, config), config)
    to_go = max(1, config.cycles - len(earlier))
    return {
        cost: target if to_go == 1 or now[cost] <= target else now[cost] * (target / now[cost]) ** (1 / to_go)
        for cost, target in targets.items()
    }


def overall_budgets(plans: Sequence[PrunePlan], config: CampHiVeConfig) -> tuple[Budget, ...]:
    """Each budget from the network before the first cycle to the last plan's."""
    if not plans or not plans[0].budgets:
        return ()
    dense = {budget.cost: budget.before for budget in plans[0].budgets}
    after = {budget.cost: budget.after for budget in plans[-1].budgets}
    targets = absolute(config.budgets, dense)
    return tuple(Budget(cost, dense[cost], target, after[cost]) for cost, target in targets.items())


def is_finished(plans: Sequence[PrunePlan], config: CampHiVeConfig) -> bool:
    """Whether all cycles are done, or earlier ones left nothing to do: a branch that goes whole may save more."""
    met = bool(plans) and all(budget.after <= budget.target for budget in overall_budgets(plans, config))
    return len(plans) >= config.cycles or met


def dense_sizes(groups: Sequence[ChannelGroup], earlier: Sequence[PrunePlan]) -> dict[str, int]:
    """Width of each group before the first cycle; a group has the name of its first layer, which may have changed."""
    dense = earlier[0].groups if earlier else groups
    size_at = {(slot.tensor, slot.axis): group.size for group in dense for slot in group.slots}
    first = {group.name: (group.slots[0].tensor, group.slots[0].axis) for group in groups}
    return {name: size_at[axis] for name, axis in first.items() if axis in size_at}


def _require_in_reach(targets: Costs, dense: Costs, least: Costs, config: CampHiVeConfig) -> None:
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
