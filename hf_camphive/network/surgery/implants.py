"""Neural implants: some of the victims stay, with 1x1 kernels in place of their kH x kW ones.

HAP (Yu et al., WACV 2022, arXiv:2101.08940) gives the more sensitive part of what it prunes a 1x1 convolution. Here a
victim of a channel group becomes 1x1 wherever it is made or read by a larger kernel. Pure: reads and returns weights.
"""

from collections.abc import Iterable, Mapping
from math import prod

import torch
from torch import Tensor

from hf_camphive.core.plan import PrunePlan, Slot


def implanted_slots(plan: PrunePlan) -> Iterable[tuple[Slot, list[int]]]:
    """Where implanted channels are made and read, and at which positions."""
    for group in plan.groups:
        if channels := plan.implants.get(group.name):
            for slot in group.slots:
                if slot.role != "affine":
                    yield slot, slot.positions(channels, group.size)


def with_centres(weight: Tensor, axis: int, positions: list[int]) -> Tensor:
    """The weight with nothing but the centre of the kernels [kH, kW] at these positions of an axis."""
    if not _has_kernel(weight.shape):
        return weight
    index = torch.tensor(positions, device=weight.device)
    kernels = weight.index_select(axis, index)
    centred = torch.zeros_like(kernels)
    row, column = weight.shape[2] // 2, weight.shape[3] // 2
    centred[..., row, column] = kernels[..., row, column]
    return weight.index_copy(axis, index, centred)


def split_off_implants(state: Mapping[str, Tensor], plan: PrunePlan) -> dict[str, Tensor]:
    """A cut state in which each convolution's implants, the last of its channels, have weights of their own.

    With o + a outputs and i + b inputs, a and b of them implanted, W [o + a, i + b, kH, kW] becomes W [o, i, kH, kW],
    `reads` [o, b, 1, 1] and `makes` [a, i + b, 1, 1]; what was implanted before comes after what is implanted now.
    """
    state = dict(state)
    counts: dict[str, list[int]] = {}
    for slot, positions in implanted_slots(plan):
        counts.setdefault(slot.tensor, [0, 0])[slot.axis] = len(positions)
    for name, (made, read) in counts.items():
        if name not in state or not _has_kernel(state[name].shape):
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


def _has_kernel(shape: Iterable[int]) -> bool:
    return len(shape := tuple(shape)) == 4 and prod(shape[2:]) > 1


def _joined(axis: int, first: Tensor, second: Tensor | None) -> Tensor:
    return first if second is None else torch.cat([first, second], dim=axis)
