"""Reconstruction: refit the kept weights layer by layer, in closed form, to reproduce the dense network's values.

In forward order, each layer's kept weights are refitted by ridge regression so that the layer, given the pruned
network's activations, outputs the dense network's values. The last layer before a residual add is fitted to the dense
sum minus the pruned shortcut, so that every block corrects the error of its input. It needs no labels and no learning
rate, and makes one pass.

Works on full-width weights (removed columns stay zero) and returns new ones; the network itself is not changed.
"""

from collections.abc import Mapping, Sequence
from math import ceil, prod

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hf_camphive.core.plan import PrunePlan
from hf_camphive.network.graph.program import argument_of, operation
from hf_camphive.network.surgery.cutting import State, mask_state
from hf_camphive.network.surgery.implants import implanted_slots, with_centres
from hf_camphive.pruning.merging.lockstep import Fit, Job, LockstepProgram
from hf_camphive.pruning.merging.ridge import NormalEquations
from hf_camphive.pruning.merging.task import MergeTask
from hf_camphive.pruning.tuning import MIN_ROWS, RIDGE_HOLDOUT_STRIDE, ROWS_PER_UNKNOWN, SILENT_SCALE

ACTIVATION_BYTES = 2**30  # most activations held between fits; beyond it they are computed again from earlier ones


def reconstruct(task: MergeTask) -> State:
    """Refit the kept weights, at full width, so that the masked network reproduces the dense network's values.

    For each layer, in forward order, solve

        min over D of  sum ||T - (W + D) x||^2 + ridge * tr(X^T X) / d * ||D||^2

    where the rows x [d] of X are patches of the kept inputs (d = C_in_kept * kH * kW), T [rows, C_out] is the target and
    W the present weight. A constant is fitted as well if the layer's bias or the norm after it can hold one
    (`constant_carrier`). For neural implants (HAP) only the centres of kernels are fitted, in the layers that produce
    them and in those that read them.

    Raises:
        ReconstructionError: A layer's activations are not finite, as after NaN in images or weights; names the layer.
    """
    state, plan, program = task.state, task.plan, task.trace.graph
    pruned = mask_state(state, plan)
    lockstep = LockstepProgram(task.trace, plan)
    entries, makers = _kept_entries(plan, state), _implanted_rows(plan, state)
    images = float(task.workers.sum(torch.tensor([float(sum(map(len, task.images)))], dtype=torch.float64)))
    held: list[dict[Job, Tensor]] = [{(False, program.image): batch} for batch in task.images]
    start = 0
    with torch.no_grad():
        for stop in task.workers.track(lockstep.stops, "Reconstruct", "layer"):
            fit = lockstep.fits[lockstep.order[stop][1]]
            constants = (program.bind(state), program.bind(pruned))
            sums = _sums_for(fit, pruned[fit.weight], entries.get(fit.weight))
            fits_in_memory = None
            for number, earlier in enumerate(held):
                values = lockstep.advance(earlier, constants, start, stop)
                if fits_in_memory is None:
                    fits_in_memory = sum(map(_bytes, values.values())) * len(held) <= ACTIVATION_BYTES
                if fits_in_memory:
                    held[number] = values
                generator = torch.Generator().manual_seed((task.seed * 1_000_003 + stop) * 1_000_003 + number)
                rows, errors = _rows(fit, lockstep, values, pruned, entries.get(fit.weight), images, generator)
                sums.add(rows, errors, held_out=number % RIDGE_HOLDOUT_STRIDE == RIDGE_HOLDOUT_STRIDE - 1)
            if fits_in_memory:
                start = stop
            solution = sums.solve(task.ridge, task.workers)
            if (rows := makers.get(fit.weight)) is not None:
                centres = _centres(pruned[fit.weight], entries.get(fit.weight))
                _fit_implants(solution, sums, rows, centres, task)
            _update(pruned, fit, lockstep, entries.get(fit.weight), *solution)
            del sums  # frees up to hundreds of MB before the next fit allocates its own
    return pruned


def _bytes(value: object) -> int:
    """Return the bytes of memory of a value: a tensor, a sequence of them, or a size (0)."""
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else getattr(value, "nbytes", 0)


# One fit


def _fit_implants(
    solution: tuple[Tensor, Tensor], sums: NormalEquations, rows: Tensor, centres: Tensor, task: MergeTask
) -> None:
    """Replace, in a solution for all outputs, that of the implanted outputs `rows` by a fit on kernel centres alone."""
    change, constant = solution
    rows = rows.to(change.device)
    at_centres, constant[0, rows] = (
        value[0] for value in sums.restricted(centres, rows).solve(task.ridge, task.workers)
    )
    change[0, rows] = 0
    change[0, rows[:, None], centres.to(rows)] = at_centres


def _sums_for(fit: Fit, weight: Tensor, entries: Tensor | None) -> NormalEquations:
    """Return empty sums for a fit of the given entries of W[0] (all of them if None) and a constant."""
    groups = argument_of(fit.node, 6, 1) if operation(fit.node) == "conv2d" else 1
    unknowns = weight[0].numel() if entries is None else len(entries)
    return NormalEquations(
        groups, unknowns + 1, weight.shape[0] // groups, weight.device, layer=fit.weight.removesuffix(".weight")
    )


def _rows(
    fit: Fit,
    lockstep: LockstepProgram,
    values: Mapping[Job, Tensor],
    pruned: Mapping[str, Tensor],
    entries: Tensor | None,
    images: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Sample rows of one batch [groups, n, d] and their errors [groups, n, C_out / groups] under the present weights.

    Each row ends in 1 if a constant can be fitted, else in 0.
    """
    x = values[lockstep.job(True, fit.node.args[0])]
    weight = pruned[fit.weight]
    target = values[False, fit.target]
    if fit.residual_add:
        target = target - values[lockstep.job(True, fit.residual_add.shortcut)]
    if operation(fit.node) == "linear" and target.dim() == 4:  # [N, H, W, C]
        target = target.movedim(-1, 1)
    picks = _pick(target, weight, images, generator)
    target = _at(target, picks)
    for norm in reversed(fit.path):
        target = _before_norm(target, norm, lockstep.tensors, pruned)
    patches = _patches(x, fit.node, weight, picks)
    groups = patches.shape[0]
    output = torch.einsum("gnd,god->gno", patches, weight.reshape(groups, -1, patches.shape[2]))
    if (bias := argument_of(fit.node, 2)) is not None:
        output = output + pruned[lockstep.tensors[bias]].view(groups, 1, -1)
    errors = target.view(len(target), groups, -1).transpose(0, 1) - output
    errors *= ~_silent(fit, lockstep.tensors, pruned).view(
        groups, 1, -1
    )  # outputs with no effect on the sum stay as they are
    if entries is not None:
        patches = patches[:, :, entries.to(patches.device)]
    carried = constant_carrier(fit.node, lockstep.tensors) is not None
    return torch.cat([patches, patches.new_full((*patches.shape[:2], 1), float(carried))], dim=-1), errors


def _update(
    pruned: State, fit: Fit, lockstep: LockstepProgram, entries: Tensor | None, change: Tensor, constant: Tensor
) -> None:
    """Add one fit's solution to the masked weights in `pruned`, in place."""
    weight = pruned[fit.weight]
    flat = weight.flatten(1).clone()
    fitted = torch.arange(flat.shape[1]) if entries is None else entries
    change = change.reshape(len(flat), len(fitted)).to(flat)
    pruned[fit.weight] = flat.index_add_(1, fitted.to(flat.device), change).view_as(weight)
    carrier = constant_carrier(fit.node, lockstep.tensors)
    if carrier:
        name, sign = carrier
        pruned[name] = pruned[name] + sign * constant.reshape(-1).to(pruned[name])


def constant_carrier(node: fx.Node, tensors: Mapping[fx.Node, str]) -> tuple[str, int] | None:
    """Return the tensor that can hold a constant added to a layer's output, and the sign with which it does.

    That is the layer's own bias (+1), or the running mean of the BatchNorm that is its only consumer (-1); None if there
    is neither.
    """
    if (bias := argument_of(node, 2)) is not None:
        return tensors[bias], 1
    users = list(node.users)
    if len(users) == 1 and operation(users[0]) == "batch_norm" and users[0].args[3] is not None:
        return tensors[users[0].args[3]], -1
    return None


def _kept_entries(plan: PrunePlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return indices into the flattened W[0] [C_in, kH, kW] that survive, for each weight that loses any."""
    left: dict[str, Tensor] = {}
    for group in plan.groups:
        removed = sorted(set(range(group.size)) - set(plan.remain[group.name]))
        for slot in group.consumers() if removed or group.name in plan.implants else ():
            mask = left.setdefault(slot.tensor, torch.ones(state[slot.tensor].shape[1:], dtype=torch.bool))
            mask[slot.positions(removed, group.size)] = False
    for slot, positions in implanted_slots(plan):
        if slot.role == "consumer":
            mask = left[slot.tensor]
            left[slot.tensor] = with_centres(mask[None], 1, positions)[0]
    return {name: mask.flatten().nonzero()[:, 0] for name, mask in left.items()}


def _implanted_rows(plan: PrunePlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the outputs [a] of each weight that are implants, for weights with kernels larger than 1x1."""
    return {
        slot.tensor: torch.tensor(positions)
        for slot, positions in implanted_slots(plan)
        if slot.role == "producer" and state[slot.tensor][0, 0].numel() > 1
    }


def _centres(weight: Tensor, entries: Tensor | None) -> Tensor:
    """Return which of the fitted entries of W[0] [C_in, kH, kW] are centres of kernels, as positions among the entries."""
    mask = torch.ones((1, *weight.shape[1:]), dtype=torch.bool)
    mask = with_centres(mask, 1, list(range(weight.shape[1]))).flatten()
    return (mask if entries is None else mask[entries]).nonzero()[:, 0]


def _pick(target: Tensor, weight: Tensor, images: float, generator: torch.Generator) -> Tensor:
    """Draw the rows of this batch that enter the fit, as flat indices over images and positions.

    A batch contributes rows in proportion to its share of all `images`.
    """
    available = target.shape[0] * prod(target.shape[2:]) if target.dim() == 4 else target.shape[:-1].numel()
    wanted = max(MIN_ROWS, ROWS_PER_UNKNOWN * weight[0].numel()) * target.shape[0] / images
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=generator)[: ceil(wanted)]


def _at(value: Tensor, picks: Tensor) -> Tensor:
    """Return the rows [n, C] of a value [N, C, H, W] or [..., C] at flat positions."""
    rows = value.movedim(1, -1) if value.dim() == 4 else value
    if len(picks) == rows.shape[:-1].numel():
        return rows.reshape(-1, rows.shape[-1]).clone()
    return rows[torch.unravel_index(picks.to(value.device), rows.shape[:-1])]


def _before_norm(rows: Tensor, norm: fx.Node, tensors: Mapping[fx.Node, str], state: Mapping[str, Tensor]) -> Tensor:
    """Invert a BatchNorm on its output rows [n, C]: z = (y - beta) / scale + mean; other operations return them unchanged."""
    if operation(norm) != "batch_norm":
        return rows
    scale, shift, mean = _norm_values(norm, tensors, state)
    return (rows - shift) / torch.where(scale == 0, torch.ones_like(scale), scale) + mean


def _norm_values(norm: fx.Node, tensors: Mapping[fx.Node, str], state: Mapping[str, Tensor]) -> list[Tensor]:
    """Return (scale, shift, mean) of a BatchNorm, each [C], with y = scale * (z - mean) + shift."""
    gamma, beta = (None if t is None else state[tensors[t]] for t in norm.args[1:3])
    mean, variance = (state[tensors[t]] for t in norm.args[3:5])
    scale = (variance + norm.args[7]).rsqrt()
    return [scale if gamma is None else scale * gamma, torch.zeros_like(mean) if beta is None else beta, mean]


def _silent(fit: Fit, tensors: Mapping[fx.Node, str], state: Mapping[str, Tensor]) -> Tensor:
    """Return which output channels a norm before the residual add scales to almost nothing, as booleans [C].

    Their fit would divide by that scale, which is below `SILENT_SCALE` times the median.
    """
    weight = state[fit.weight]
    silent = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    for norm in fit.path:
        if operation(norm) == "batch_norm":
            scale = _norm_values(norm, tensors, state)[0].abs()
            silent |= scale < SILENT_SCALE * scale.median().clamp_min(1e-12)
    return silent


def _patches(x: Tensor, node: fx.Node, weight: Tensor, picks: Tensor) -> Tensor:
    """Return the input patches [groups, n, C_in / groups * kH * kW] of a layer at flat output positions [n]."""
    if operation(node) == "linear":
        return x.reshape(-1, x.shape[-1])[picks.to(x.device)].unsqueeze(0)
    stride, padding = argument_of(node, 3, 1), argument_of(node, 4, 0)
    dilation, groups = argument_of(node, 5, 1), argument_of(node, 6, 1)
    stride, padding, dilation = (_pair(value) for value in (stride, padding, dilation))
    kernel = weight.shape[2:]
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    size = [(x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    image, row, column = torch.unravel_index(picks.to(x.device), (x.shape[0], *size))
    rows = row[:, None] * stride[0] + torch.arange(kernel[0], device=x.device) * dilation[0]
    cols = column[:, None] * stride[1] + torch.arange(kernel[1], device=x.device) * dilation[1]
    found = x.movedim(1, -1)[image[:, None, None], rows[:, :, None], cols[:, None, :]]  # [n, kH, kW, C]
    found = found.movedim(-1, 1).reshape(len(picks), groups, -1)
    return found.transpose(0, 1)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])
