"""torch-pruning 1.6.1 as a method of a comparison: its importances choose the channels, all else is done as for ours.

torch-pruning really prunes a copy of the network, globally; its channel ratio is bisected until the MACs are within 1 % of
the target (where its steps are coarser than that, they stay above it, never below). The indices that it removed are then written down as a plan for our channel groups, so that the same merge
rules, BatchNorm recalibration and finetuning can follow. Two things are checked every time: that its index sets agree on
every tensor of each of our groups, and that its network computes what ours does when masked by the plan.

Its GroupHessianImportance is left out: in 1.6.1 it keeps the last sample's gradient only.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torch_pruning as tp
from torch import Tensor, nn

from hf_camphive.core.errors import PlanError
from hf_camphive.core.plan import ChannelCut, ChannelGroup, PrunePlan, Slot
from hf_camphive.network.footprint import count_macs
from hf_camphive.network.graph.blocks import exterior_groups
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.surgery.cutting import mask_state
from hf_camphive.runs.comparison import Method, Problem

TOLERANCE, COARSEST = 0.01, 0.05
Removed = dict[tuple[str, int], set[int]]  # (weight, axis) -> positions
IMPORTANCES: dict[str, Callable[[], tp.importance.Importance]] = {
    "magnitude": partial(tp.importance.GroupMagnitudeImportance, p=2, group_reduction="first"),
    "group-norm": partial(tp.importance.GroupMagnitudeImportance, p=2, group_reduction="mean"),
    "lamp": partial(tp.importance.LAMPImportance, p=2),
    "taylor": tp.importance.GroupTaylorImportance,
}


def methods() -> dict[str, Method]:
    """`tp-NAME` prunes the groups that our default scope does, `tp-NAME-all` everything but the classifier, as it does unasked."""
    found: dict[str, Method] = {}
    for name, importance in IMPORTANCES.items():
        found[f"tp-{name}"] = partial(plan, importance=importance, interior=True)
        found[f"tp-{name}-all"] = partial(plan, importance=importance, interior=False)
    return found


def plan(problem: Problem, importance: Callable[[], tp.importance.Importance], interior: bool) -> PrunePlan:
    """The plan of torch-pruning's global pruning to the target.

    Raises `PlanError` where torch-pruning does not reach the target, or where what it did does not fit our groups.
    """
    ignored = list(_ignored(problem, interior))
    if isinstance(importance(), tp.importance.GroupTaylorImportance):
        _differentiate(problem)
    pruned = _search(problem.target_macs, lambda ratio: _prune(problem, importance(), ignored, ratio))
    keep = _on_groups(problem.trace.groups, pruned.removed)
    plan = PrunePlan(
        groups=problem.trace.groups,
        branches=(),
        cuts=tuple(ChannelCut(name, channels) for name, channels in keep.items()),
        dropped=(),
        criterion="torch-pruning",
        merge="none",
        macs_before=count_macs(problem.net, problem.trace.input_size),
        macs_after=pruned.macs,
    )
    _check_same_function(problem, plan, pruned.net)
    return plan


@dataclass(frozen=True)
class Pruned:
    """A network that torch-pruning cut, what it removed, and its MACs per image."""

    net: nn.Module
    removed: Removed
    macs: int


def _ignored(problem: Problem, interior: bool) -> Iterator[str]:
    """Names of the layers whose outputs torch-pruning must leave alone: the classifier, and unless asked, those between blocks."""
    classifier = problem.net.get_classifier()
    yield next(name for name, module in problem.net.named_modules() if module is classifier)
    exterior = exterior_groups(problem.trace)
    for group in problem.trace.groups:
        if group.frozen or (interior and group.name in exterior):
            yield from {slot.tensor.removesuffix(".weight") for slot in group.slots if slot.role == "producer"}


def _differentiate(problem: Problem) -> None:
    """Leave gradients of the mean cross-entropy at the true labels, over all calibration images, in the network."""
    problem.net.zero_grad()
    for images, labels in zip(problem.calibration.images, problem.calibration.labels):
        (F.cross_entropy(problem.net(images), labels, reduction="sum") / problem.calibration.total).backward()


def _search(target: int, prune: Callable[[float], Pruned]) -> Pruned:
    """Bisect the channel ratio for the fewest MACs that are not below the target by more than 1 %."""
    low, high, best = 0.0, 1.0, None
    for _ in range(16):
        ratio = (low + high) / 2
        found = prune(ratio)
        if found.macs >= (1 - TOLERANCE) * target and (best is None or found.macs < best.macs):
            best = found
        if abs(found.macs / target - 1) < TOLERANCE / 2:
            return found
        low, high = (ratio, high) if found.macs > target else (low, ratio)
    if best is None or best.macs > (1 + COARSEST) * target:
        reached = "none near it" if best is None else f"{best.macs:,} at best"
        raise PlanError(
            f"{target:,} MACs per image were asked for, and torch-pruning comes to {reached}: it skips layers that would "
            "lose all channels"
        )
    return best


def _prune(problem: Problem, importance: tp.importance.Importance, ignored: Iterable[str], ratio: float) -> Pruned:
    net = copy.deepcopy(problem.net)
    for parameter, original in zip(net.parameters(), problem.net.parameters()):
        parameter.grad = None if original.grad is None else original.grad.clone()
    modules = dict(net.named_modules())
    names = {module: name for name, module in modules.items()}
    size = problem.trace.input_size
    pruner = tp.pruner.BasePruner(
        net,
        torch.zeros(1, *size, device=next(net.parameters()).device),
        importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[modules[name] for name in ignored],
        # Its own default arguments are dictionaries that all its pruners would share.
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    removed: Removed = defaultdict(set)
    for group in pruner.step(interactive=True):
        for dependency, positions in group:
            module, is_output = dependency.target.module, pruner.DG.is_out_channel_pruning_fn(dependency.handler)
            if isinstance(module, nn.Conv2d | nn.Linear):
                depthwise = isinstance(module, nn.Conv2d) and module.groups == module.out_channels > 1
                axis = 0 if is_output or depthwise else 1
                removed[f"{names[module]}.weight", axis] |= set(positions)
        group.prune()
    return Pruned(net.eval(), dict(removed), count_macs(net, size))


def _on_groups(groups: Iterable[ChannelGroup], removed: Removed) -> dict[str, tuple[int, ...]]:
    """Kept channels of our groups from positions removed of each weight's axis; raises `PlanError` where these disagree."""
    keep: dict[str, tuple[int, ...]] = {}
    explained: Removed = defaultdict(set)
    for group in groups:
        slots = [slot for slot in group.slots if slot.tensor.endswith(".weight") and _is_layer(slot, removed)]
        gone = set()
        for slot in slots:
            repeat = len(slot.index) // group.size
            taken = removed.get((slot.tensor, slot.axis), set())
            gone |= {i // repeat for i, position in enumerate(slot.index) if position in taken}
        for slot in slots:
            positions = set(slot.positions(gone, group.size))
            explained[slot.tensor, slot.axis] |= positions
            if not positions <= removed.get((slot.tensor, slot.axis), set()):
                raise PlanError(
                    f"torch-pruning removes other channels of {slot.tensor} than of the layers coupled with it in group "
                    f"{group.name!r}; the two disagree about this network"
                )
        if gone:
            keep[group.name] = tuple(channel for channel in range(group.size) if channel not in gone)
    for where, positions in removed.items():
        if positions - explained[where]:
            raise PlanError(f"torch-pruning removes positions of {where[0]} that belong to none of our channel groups")
    return keep


def _is_layer(slot: Slot, removed: Removed) -> bool:
    """Whether torch-pruning reports this slot: an axis of a convolution or linear layer (BatchNorms follow them)."""
    return slot.role in ("producer", "consumer") or (slot.tensor, slot.axis) in removed


def _check_same_function(problem: Problem, plan: PrunePlan, net: nn.Module) -> None:
    """Raise unless torch-pruning's network computes what ours does with the plan's channels masked."""
    images = problem.calibration.images[0][:2]
    with torch.no_grad():
        (masked,) = problem.trace.graph.run(mask_state(named_tensors(problem.net), plan), images)
        theirs: Tensor = net(images)
    error = float((theirs - masked).abs().max() / masked.abs().max().clamp_min(1e-12))
    if not error < 1e-3:
        raise PlanError(
            f"torch-pruning's network is not ours with the same channels masked (relative error {error:.1e})"
        )
