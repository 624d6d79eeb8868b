"""Reconstruction: the kept channels take over what the removed ones did, layer by layer, in closed form.

In forward order each layer's kept weights are refitted by ridge regression so that, fed with the pruned network's
activations, the layer gives the dense network's output; the last layer before a residual add is fitted to the dense sum
minus the pruned shortcut, so that every block repairs the error it inherits. No labels, no learning rate, one pass.

Works on full-width weights (removed columns stay zero) and returns new ones; the network itself is not touched.
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

ACTIVATION_BYTES = 2**30  # activations held between fits; beyond this they are computed again from earlier ones


def reconstruct(task: MergeTask) -> State:
    """Refit the kept weights, at full width, so that the masked network gives the dense network's values, layer by layer.

    For each layer, min over D of sum ||T - (W + D) x||^2 + ridge * tr(X^T X) / d * ||D||^2, where the rows x [d] of X are
    the patches of kept inputs (d = C_in_kept * kH * kW), T [rows, C_out] is the target and W the present weight. A
    constant is fitted with it where the layer's bias or the norm after it can carry one. Of implants (HAP) only the centre of
    each kernel is fitted, where they are read and where they are made.

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
            del sums  # may be hundreds of MB, which the next fit need not add to
    return pruned


def _bytes(value: object) -> int:
    """Return the bytes of memory of a value: a tensor, several of them, or a size."""
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else getattr(value, "nbytes", 0)


# One fit


def _fit_implants(
    solution: tuple[Tensor, Tensor], sums: NormalEquations, rows: Tensor, centres: Tensor, task: MergeTask
) -> None:
    """Fit the outputs `rows` anew on the kernels' centres alone, within a solution for all."""
    change, constant = solution
    rows = rows.to(change.device)
    part, constant[0, rows] = (value[0] for value in sums.part(centres, rows).solve(task.ridge, task.workers))
    change[0, rows] = 0
    change[0, rows[:, None], centres.to(rows)] = part


def _sums_for(fit: Fit, weight: Tensor, entries: Tensor | None) -> NormalEquations:
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
    """Sampled rows of one batch [groups, n, d], each ending in 1, and their errors [groups, n, C_out / groups]."""
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
    errors *= ~_silent(fit, lockstep.tensors, pruned).view(groups, 1, -1)  # what nobody hears stays as it is
    if entries is not None:
        patches = patches[:, :, entries.to(patches.device)]
    carried = constant_carrier(fit.node, lockstep.tensors) is not None
    return torch.cat([patches, patches.new_full((*patches.shape[:2], 1), float(carried))], dim=-1), errors


def _update(
    pruned: State, fit: Fit, lockstep: LockstepProgram, entries: Tensor | None, change: Tensor, constant: Tensor
) -> None:
    """Write one fit's solution into the masked weights."""
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
    """The tensor that can carry a constant added to a layer's output, and the sign with which it does.

    That is the layer's own bias, or the running mean of the norm that alone reads it; None where there is neither.
    """
    if (bias := argument_of(node, 2)) is not None:
        return tensors[bias], 1
    users = list(node.users)
    if len(users) == 1 and operation(users[0]) == "batch_norm" and users[0].args[3] is not None:
        return tensors[users[0].args[3]], -1
    return None


def _kept_entries(plan: PrunePlan, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flat positions within W[0] [C_in, kH, kW] that remain, for every weight of which some go."""
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
    """Outputs [a] of each weight that are implants, where its kernels are larger than 1x1."""
    return {
        slot.tensor: torch.tensor(positions)
        for slot, positions in implanted_slots(plan)
        if slot.role == "producer" and state[slot.tensor][0, 0].numel() > 1
    }


def _centres(weight: Tensor, entries: Tensor | None) -> Tensor:
    """Which of the fitted entries of W[0] [C_in, kH, kW] are the centre of a kernel."""
    mask = torch.ones((1, *weight.shape[1:]), dtype=torch.bool)
    mask = with_centres(mask, 1, list(range(weight.shape[1]))).flatten()
    return (mask if entries is None else mask[entries]).nonzero()[:, 0]


def _pick(target: Tensor, weight: Tensor, images: float, generator: torch.Generator) -> Tensor:
    """Which rows of this batch enter the fit: flat indices over images and positions, as many from each image."""
    available = target.shape[0] * prod(target.shape[2:]) if target.dim() == 4 else target.shape[:-1].numel()
    wanted = max(MIN_ROWS, ROWS_PER_UNKNOWN * weight[0].numel()) * target.shape[0] / images
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=generator)[: ceil(wanted)]


def _at(value: Tensor, picks: Tensor) -> Tensor:
    """Rows [n, C] of a value [N, C, H, W] or [..., C] at flat positions."""
    rows = value.movedim(1, -1) if value.dim() == 4 else value
    if len(picks) == rows.shape[:-1].numel():
        return rows.reshape(-1, rows.shape[-1]).clone()
    return rows[torch.unravel_index(picks.to(value.device), rows.shape[:-1])]


def _before_norm(rows: Tensor, norm: fx.Node, tensors: Mapping[fx.Node, str], state: Mapping[str, Tensor]) -> Tensor:
    """The input of a batch norm from its output: z = (y - beta) / scale + mean."""
    if operation(norm) != "batch_norm":
        return rows
    scale, shift, mean = _norm_values(norm, tensors, state)
    return (rows - shift) / torch.where(scale == 0, torch.ones_like(scale), scale) + mean


def _norm_values(norm: fx.Node, tensors: Mapping[fx.Node, str], state: Mapping[str, Tensor]) -> list[Tensor]:
    """(scale, shift, mean) of a batch norm, each [C]: y = scale * (z - mean) + shift."""
    gamma, beta, mean, variance = (state[tensors[t]] if t is not None else None for t in norm.args[1:5])
    scale = (variance + norm.args[7]).rsqrt()
    return [scale if gamma is None else scale * gamma, torch.zeros_like(mean) if beta is None else beta, mean]


def _silent(fit: Fit, tensors: Mapping[fx.Node, str], state: Mapping[str, Tensor]) -> Tensor:
    """Output channels whose way to the residual add is scaled by (almost) nothing, as booleans [C]."""
    weight = state[fit.weight]
    silent = torch.zeros(weight.shape[0], dtype=torch.bool, device=weight.device)
    for norm in fit.path:
        if operation(norm) == "batch_norm":
            scale = _norm_values(norm, tensors, state)[0].abs()
            silent |= scale < SILENT_SCALE * scale.median().clamp_min(1e-12)
    return silent


def _patches(x: Tensor, node: fx.Node, weight: Tensor, picks: Tensor) -> Tensor:
    """Input patches [groups, n, C_in / groups * kH * kW] of a layer at flat output positions."""
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
