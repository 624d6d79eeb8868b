"""Neural implants: keep some channels that would be removed, with 1x1 kernels instead of their kH x kW kernels.

HAP (Yu et al., WACV 2022, arXiv:2101.08940) replaces the more sensitive of the channels that it prunes by a 1x1 convolution.
Here an implanted channel gets 1x1 kernels wherever a larger kernel produces or reads it. The functions take weights and
return new ones; networks are not changed.
"""

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from hf_camphive.core.plan import PrunePlan, Slot


def implanted_slots(plan: PrunePlan) -> Iterable[tuple[Slot, list[int]]]:
    """Yield the slots that produce or read implanted channels, with the positions of these channels."""
    for group in plan.groups:
        if channels := plan.implants.get(group.name):
            for slot in group.slots:
                if slot.role != "affine":
                    yield slot, slot.positions(channels, group.size)


def with_centres(weight: Tensor, axis: int, positions: list[int]) -> Tensor:
    """Return the weight with all but the centre of its kernels [kH, kW] set to zero at these positions of an axis."""
    if not has_kernel(weight.shape):
        return weight
    index = torch.tensor(positions, device=weight.device)
    kernels = weight.index_select(axis, index)
    centred = torch.zeros_like(kernels)
    row, column = weight.shape[2] // 2, weight.shape[3] // 2
    centred[..., row, column] = kernels[..., row, column]
    return weight.index_copy(axis, index, centred)


def split_off_implants(state: Mapping[str, Tensor], plan: PrunePlan) -> dict[str, Tensor]:
    """Return a cut state in which each convolution's implanted channels, the last ones, have weights of their own.

    With o + a outputs and i + b inputs, of which the last a and b are implanted, W [o + a, i + b, kH, kW] becomes
    W [o, i, kH, kW], `reads` [o, b, 1, 1] and `makes` [a, i + b, 1, 1]. Channels implanted by an earlier plan are placed
    after the new ones.
    """
    state = dict(state)
    counts: dict[str, list[int]] = {}
    for slot, positions in implanted_slots(plan):
        counts.setdefault(slot.tensor, [0, 0])[slot.axis] = len(positions)
    for name, (made, read) in counts.items():
        if name not in state or not has_kernel(state[name].shape):
            continue
        weight, layer = state[name], name.removesuffix("weight")
        o, i = weight.shape[0] - made, weight.shape[1] - read
        centre = weight[..., weight.shape[2] // 2, weight.shape[3] // 2][..., None, None]
        reads = _joined(1, centre[:, i:], state.get(f"{layer}reads.weight"))
        makes = _joined(0, torch.cat([centre[o:, :i], reads[o:]], dim=1), state.get(f"{layer}makes.weight"))
        state[name] = weight[:o, :i]
        if reads.shape[1]:
            state[f"{layer}reads.weight"] = reads[:o]
        if len(makes):
            state[f"{layer}makes.weight"] = makes
            if (bias := state.get(f"{layer}bias")) is not None:
                state[f"{layer}makes.bias"] = _joined(0, bias[o:], state.get(f"{layer}makes.bias"))
                state[f"{layer}bias"] = bias[:o]
    return state


def has_kernel(shape: Iterable[int]) -> bool:
    """Return whether a weight shape is that of a convolution with a kernel larger than 1x1."""
    return len(shape := tuple(shape)) == 4 and prod(shape[2:]) > 1


def _joined(axis: int, first: Tensor, second: Tensor | None) -> Tensor:
    """Concatenate two tensors along an axis; the second may be absent."""
    return first if second is None else torch.cat([first, second], dim=axis)
