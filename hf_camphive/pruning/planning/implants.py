"""Plans with neural implants (HAP, arXiv:2101.08940): which removed channels keep 1x1 kernels, within a budget of MACs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import prod

from torch import Tensor

from hf_camphive.core.errors import PlanError
from hf_camphive.core.plan import ChannelGroup, PrunePlan
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.graph.program import argument_of, operation
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.network.surgery.implants import has_kernel, implanted_slots


def implantable_groups(trace: Trace) -> frozenset[str]:
    """Return the names of the groups whose channels can become implants.

    Such a group is produced or read by convolutions larger than 1x1, each of which keeps the image size up to its
    stride, has no convolution groups, and carries only this group along that axis.
    """
    sizes, plain = _kernels(trace)
    return frozenset(group.name for group in trace.groups if not group.frozen and _fits(group, sizes, plain))


def with_implants(
    plan_for: Callable[[int], PrunePlan],
    target_macs: int,
    ratio: float,
    scores: Mapping[str, Tensor],
    analysis: NetworkAnalysis,
) -> PrunePlan:
    """Plan a network of at most `target_macs` in which the share `ratio` of removed channels keeps 1x1 kernels.

    Implants are the removed channels with the highest scores. Since they cost MACs, `plan_for(target)` is called with
    decreasing targets until the plan and its implants fit together.

    Raises:
        PlanError: No group can have implants, or implants do not fit into the budget.
    """
    groups = implantable_groups(analysis.trace)
    if not groups:
        raise PlanError(
            "implant_ratio is set, but no channel group of this network is made or read by a dense convolution larger "
            "than 1x1, so implants would save nothing; set implant_ratio to 0"
        )
    target = target_macs
    while True:
        try:
            plan = plan_for(target)
        except PlanError as error:
            if target == target_macs:
                raise
            raise PlanError(
                f"a budget of {target_macs:,} MACs per image leaves no room for implants ({error}); lower implant_ratio"
            ) from error
        plan = _implanted(plan, ratio, scores, groups)
        macs = macs_after(plan, analysis.trace.positions, analysis.shapes)
        if macs <= target_macs:
            budgets = tuple(
                replace(b, target=target_macs, after=macs) if b.cost == "macs" else b for b in plan.budgets
            )
            return replace(plan, macs_after=macs, budgets=budgets)
        target = min(target, plan.macs_after) - (macs - target_macs)


def macs_after(plan: PrunePlan, positions: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the multiply-accumulates per image of a planned network, accounting for implants and dropped branches.

    A weight [o + a, i + b, kH, kW] of which a outputs and b inputs are implants costs o i kH kW + o b + a (i + b) per
    output position.
    """
    gone = {name for branch in plan.branches if branch.module in plan.dropped for name in branch.tensors}
    lost: dict[tuple[str, int], int] = {}
    implants: dict[tuple[str, int], int] = {}
    for group in plan.groups:
        removed = group.size - len(plan.remain[group.name])
        for slot in group.slots:
            repeat = len(slot.index) // group.size
            place = slot.tensor, slot.axis
            lost[place] = lost.get(place, 0) + removed * repeat
    for slot, where in implanted_slots(plan):
        implants[slot.tensor, slot.axis] = len(where)
    total = 0
    for name, count in positions.items():
        if name in gone:
            continue
        shape = [size - lost.get((name, axis), 0) for axis, size in enumerate(shapes[name])]
        whole = [size - implants.get((name, axis), 0) for axis, size in enumerate(shape[:2])]
        kernel = prod(shape[2:])
        total += count * (prod(whole) * kernel + prod(shape[:2]) - prod(whole))
    return total


def _implanted(plan: PrunePlan, ratio: float, scores: Mapping[str, Tensor], groups: frozenset[str]) -> PrunePlan:
    """Return the plan with implants: the share `ratio` with the highest scores of all channels removed from `groups`."""
    sizes = {group.name: group.size for group in plan.groups}
    lost = {name for branch in plan.branches if branch.module in plan.dropped for name in branch.groups}
    removed = [
        (-float(scores[cut.group][channel]), order, channel)
        for order, cut in enumerate(plan.cuts)
        if cut.group in groups and cut.keep and cut.group not in lost
        for channel in sorted(set(range(sizes[cut.group])) - set(cut.keep))
    ]
    chosen = sorted(removed)[: round(ratio * len(removed))]
    cuts = tuple(
        replace(cut, implants=tuple(sorted(channel for _, at, channel in chosen if at == order)))
        for order, cut in enumerate(plan.cuts)
    )
    return replace(plan, cuts=cuts)


def _kernels(trace: Trace) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Return the shapes of all convolution weights larger than 1x1, and the names of those that 1x1 kernels can replace."""
    sizes: dict[str, tuple[int, ...]] = {}
    plain = set()
    for node in trace.graph.operations:
        name = trace.graph.tensors.get(node.args[1]) if operation(node) == "conv2d" else None
        if name is None:
            continue
        shape = tuple(node.args[1].meta["val"].shape)
        if has_kernel(shape):
            padding, dilation, groups = argument_of(node, 4, 0), argument_of(node, 5, 1), argument_of(node, 6, 1)
            same = not isinstance(padding, str) and all(
                size % 2 and 2 * p == d * (size - 1) for size, p, d in zip(shape[2:], _pair(padding), _pair(dilation))
            )
            if same and groups == 1 and name not in sizes:
                plain.add(name)
            else:
                plain.discard(name)
            sizes[name] = shape
    return sizes, frozenset(plain)


def _fits(group: ChannelGroup, sizes: Mapping[str, tuple[int, ...]], plain: frozenset[str]) -> bool:
    """Return whether a group's channels can become implants (`implantable_groups`), given the result of `_kernels`."""
    kernels = [slot for slot in group.slots if slot.tensor in sizes and slot.axis < 2]
    return (
        any(slot.role != "affine" for slot in kernels)
        and all(slot.role != "affine" or slot.axis for slot in kernels)
        and all(slot.tensor in plain and len(slot.index) == sizes[slot.tensor][slot.axis] for slot in kernels)
        and all(len(slot.index) == group.size for slot in group.slots)
    )


def _pair(value: int | Iterable[int]) -> tuple[int, int]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values[0], values[-1]
