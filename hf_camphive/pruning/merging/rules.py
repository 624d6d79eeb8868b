"""Merge rules: what the consumers of a removed channel read instead. One function per rule, and the table `MERGERS`.

The rules here replace each consumer's weight W [C_out, C, kH, kW] by W R along its input channels. R [C, C] is the
identity on kept channels, and the row of a removed channel s holds the coefficients of the kept channels that replace
it. `reconstruct` refits whole kernels instead (`reconstruction.py`). All rules work at full width. `register_merge_rule`
adds a rule from outside the package.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from hf_camphive.core import methods
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.plan import PrunePlan, Slot
from hf_camphive.core.runtime import to_float64
from hf_camphive.network.graph.program import operation, weight_of
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.network.surgery.cutting import State, mask_state
from hf_camphive.pruning.merging.reconstruction import constant_carrier, reconstruct
from hf_camphive.pruning.merging.task import MergeTask
from hf_camphive.pruning.tuning import CYCLIC_COEFFICIENT


@dataclass(frozen=True)
class ConsumerCut:
    """Describe a cut for one consumer: the group's size, kept channels, (removed, receiver) pairs, and input moments.

    `mean` [C] and `second` [C, C] are the first and second moments of the channels over images and positions, or None
    for a rule that reads no images. `ridge` is relative to the mean variance of the kept channels.
    """

    size: int
    keep: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...] = ()
    mean: Tensor | None = None
    second: Tensor | None = None
    ridge: float = CampHiVeConfig.ridge

    @property
    def removed(self) -> list[int]:
        """Return the channels that are not kept, ascending."""
        kept = set(self.keep)
        return [c for c in range(self.size) if c not in kept]


Mixture = tuple[Tensor, Tensor]
"""Coefficients [C, C], whose rows are zero except for removed channels, and the constant of each channel [C]."""


def none(cut: ConsumerCut) -> Mixture:
    """Replace each removed channel by zero, a_s ~ 0: a plain cut."""
    size = cut.size
    return torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)


def cyclic(cut: ConsumerCut) -> Mixture:
    """Replace each removed channel by half of its cyclic partner, a_s ~ 0.5 a_t for the pair (s, t).

    CAMP-HiVe's merge (arXiv:2511.06265).

    Deviation: the paper merges single weights, this rule channels.
    """
    rows, constant = none(cut)
    for s, t in cut.pairs:
        rows[s, t] = CYCLIC_COEFFICIENT
    return rows, constant


def cyclic_ls(cut: ConsumerCut) -> Mixture:
    """Replace each removed channel by the least-squares multiple of its cyclic partner.

    a_s ~ beta a_t for the pair (s, t), beta = E[a_s a_t] / E[a_t^2].
    """
    rows, constant = none(cut)
    for s, t in cut.pairs:
        rows[s, t] = cut.second[s, t] / cut.second[t, t].clamp_min(1e-30)
    return rows, constant


def nearest(cut: ConsumerCut) -> Mixture:
    """Replace each removed channel by a multiple of the one kept channel that predicts it best.

    a_s ~ beta a_t, beta = E[a_s a_t] / E[a_t^2], with the kept t that maximises E[a_s a_t]^2 / E[a_t^2].
    """
    rows, constant = none(cut)
    keep = list(cut.keep)
    squares = cut.second.diagonal()[keep].clamp_min(1e-30)
    for s in cut.removed:
        products = cut.second[s, keep]
        best = int((products.square() / squares).argmax())
        rows[s, keep[best]] = products[best] / squares[best]
    return rows, constant


def lstsq(cut: ConsumerCut) -> Mixture:
    """Replace each removed channel by its ridge regression on all kept channels K and a constant.

    a_s ~ R_s a_K + c_s, with R = S_PK (S_KK + r I)^-1 for covariances S, removed channels P, and r `cut.ridge` times the
    mean variance of the kept channels.
    """
    rows, constant = none(cut)
    keep, removed = list(cut.keep), cut.removed
    covariance = cut.second - torch.outer(cut.mean, cut.mean)
    kept = covariance[keep][:, keep]
    damping = (cut.ridge * kept.diagonal().mean()).clamp_min(1e-30) * torch.eye(len(keep), dtype=kept.dtype)
    solution = torch.linalg.solve(kept + damping, covariance[keep][:, removed]).T
    rows[torch.tensor(removed)[:, None], torch.tensor(keep)[None, :]] = solution
    constant[removed] = cut.mean[removed] - solution @ cut.mean[keep]
    return rows, constant


MergeRule = Callable[[MergeTask], State]
"""A merge rule: from a task to the full-width weights after merging, the columns of removed channels zero."""


def mixing(mix: Callable[[ConsumerCut], Mixture]) -> MergeRule:
    """Return the merge rule that replaces removed channels by the mixtures of kept ones that `mix` computes per consumer."""
    return partial(mix_channels, mix)


def merge(task: MergeTask) -> State:
    """Apply the plan's merge rule; return full-width weights whose columns of removed channels are zero."""
    return MERGERS[task.plan.merge](task)


def with_pairs(plan: PrunePlan, scores: Mapping[str, Tensor]) -> PrunePlan:
    """Return the plan with cyclic (removed, receiver) pairs in its cuts if its merge rule needs pairs, else unchanged."""
    if not methods.MERGE_RULES[plan.merge].pairs:
        return plan
    cuts = tuple(replace(cut, pairs=cyclic_pairs(scores[cut.group], cut.keep)) for cut in plan.cuts)
    return replace(plan, cuts=cuts)


def mix_channels(mix: Callable[[ConsumerCut], Mixture], task: MergeTask) -> State:
    """Replace W by W R for each consumer, with R from `mix`; constants are added where a bias or norm can hold them.

    Implants are merged like any removed channel, and the weights that read them start at zero.
    """
    plan, state, layers = task.plan.without_implants(), task.state, _layers(task.trace)
    pairs = {cut.group: cut.pairs for cut in plan.cuts}
    consumers = [
        (group, slot, plan.keep[group.name])
        for group in plan.groups
        for slot in group.consumers()
        if 0 < len(plan.keep[group.name]) < group.size
    ]
    read = {slot.tensor for _, slot, _ in consumers}
    moments = _moments(task, {layers[name] for name in read}) if methods.MERGE_RULES[plan.merge].reads_images else {}
    merged = dict(state)
    for group, slot, keep in consumers:
        mean, second = None, None
        if moments:
            per_group = state[slot.tensor].shape[1]
            mean, second = _on_channels(moments[layers[slot.tensor]], slot, group.size, per_group)
        rows, constant = mix(ConsumerCut(group.size, keep, pairs[group.name], mean, second, task.ridge))
        merged[slot.tensor], extra = _mixed(merged[slot.tensor], slot, rows, constant)
        carrier = constant_carrier(layers[slot.tensor], task.trace.graph.tensors)
        if carrier and extra.any():
            name, sign = carrier
            merged[name] = merged[name] + sign * extra.to(merged[name])
    return mask_state(merged, plan)


def _layers(trace: Trace) -> dict[str, fx.Node]:
    """Return the convolution or linear layer that uses each weight (the last one if there are several)."""
    tensors = trace.graph.tensors
    return {tensors[weight]: node for node in trace.graph.operations if (weight := weight_of(node)) in tensors}


def _moments(task: MergeTask, layers: set[fx.Node]) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """Return the mean [C_in] and second moment [C_in, C_in] of each layer's input channels, in float64.

    Averages are over the images of all processes and over positions.
    """
    sums: dict[fx.Node, Tensor] = {}
    sources = {layer: layer.args[0] for layer in layers}
    with torch.no_grad():
        for images in task.images:
            values = dict(zip(sources, task.trace.graph.run(task.state, images, list(sources.values()))))
            for layer, x in values.items():
                rows = x.movedim(1, -1) if operation(layer) == "conv2d" else x
                rows = rows.reshape(-1, rows.shape[-1])
                rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
                sums[layer] = sums.get(layer, 0) + sum(to_float64(some.mT @ some) for some in rows.split(8192))
    moments = {}
    for layer, total in sums.items():
        total = task.workers.sum(total).cpu()
        total = total / total[-1, -1]
        moments[layer] = (total[-1, :-1], total[:-1, :-1])
    return moments


def _on_channels(moments: tuple[Tensor, Tensor], slot: Slot, size: int, per_group: int) -> tuple[Tensor, Tensor]:
    """Reduce moments of a layer's inputs to a group's channels, averaged over the input positions of each channel.

    A grouped convolution reads the same offset of each of its groups; a flattened map repeats each channel.
    """
    mean, second = moments
    index = torch.tensor(slot.index).view(size, -1)
    starts = range(0, len(mean), per_group)
    offsets = [index[:, r] + start for r in range(index.shape[1]) for start in starts]
    return (
        torch.stack([mean[i] for i in offsets]).mean(0),
        torch.stack([second[i][:, i] for i in offsets]).mean(0),
    )


def _mixed(weight: Tensor, slot: Slot, rows: Tensor, constant: Tensor) -> tuple[Tensor, Tensor]:
    """Return W + W rows along the slot's axis, and the constant added to each output, sum_s sum_taps W[:, s] constant[s]."""
    index = torch.tensor(slot.index).view(len(rows), -1)
    weight, extra = weight.clone(), torch.zeros(weight.shape[0], dtype=torch.float64)
    for positions in index.T:
        columns = weight[:, positions].cpu().double()
        weight[:, positions] += torch.einsum("os...,st->ot...", columns, rows).to(weight)
        extra += columns.flatten(2).sum(2) @ constant if columns.dim() > 2 else columns @ constant
    return weight, extra


def cyclic_pairs(scores: Tensor, keep: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Pair removed channel r with kept channel r mod K, both sorted by descending score; returns (removed, receiver) pairs.

    The cyclic pairing of CAMP-HiVe (arXiv:2511.06265). `scores` is [C].

    Deviation: the authors' code pairs by position in memory; this pairs by rank, as the paper says.
    """
    kept = set(keep)
    order = sorted(range(len(scores)), key=lambda c: (-float(scores[c]), c))
    receivers = [c for c in order if c in kept]
    removed = [c for c in order if c not in kept]
    if not receivers:
        return ()
    return tuple((c, receivers[r % len(receivers)]) for r, c in enumerate(removed))


MERGERS: dict[str, MergeRule] = {
    "reconstruct": reconstruct,
    "lstsq": mixing(lstsq),
    "nearest": mixing(nearest),
    "cyclic-ls": mixing(cyclic_ls),
    "cyclic": mixing(cyclic),
    "none": mixing(none),
}


def register_merge_rule(name: str, function: MergeRule, *, wording: str, **needs: Any) -> None:
    """Add a merge rule from outside the package; `merge=name` and `--merge name` then choose it.

        >>> def faint(cut):  # a hundredth of the cyclic partner takes the place of each removed channel
        ...     return tuple(0.02 * values for values in cyclic(cut))
        >>> register_merge_rule("faint", mixing(faint), wording="removed channels were nearly dropped", pairs=True)

    `function` maps a `MergeTask` to full-width weights, the columns of removed channels zero; `mixing` makes such a
    function of one that mixes kept channels. `wording` is a clause of the model card; `needs` are the other fields of
    `core.methods.MergeRuleRow`, such as `reads_images` and `pairs`.

    Raises:
        ConfigError: The name is taken or holds unusual characters.
    """
    methods.register(methods.MERGE_RULES, methods.MergeRuleRow(name, wording, **needs))
    MERGERS[name] = function
