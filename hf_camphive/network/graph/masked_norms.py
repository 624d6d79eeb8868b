"""Norms whose statistics run over channels, with an argument for channels that the statistics leave out.

Setting removed channels to zero does not mask them for a LayerNorm over channels, because zeros count in its mean. The
functions here take the removed channels as `gone` [R]: they return what the norm over the remaining channels alone returns,
and zero at the removed ones. With no channel removed they are the ordinary operations, bit for bit.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def layer_norm(
    x: Tensor, shape: list[int], weight=None, bias=None, eps: float = 1e-5, _=True, *, gone: Tensor
) -> Tensor:
    """Return the LayerNorm of x [..., C] over its last axis, without the channels `gone`."""
    if not len(gone):
        return aten.layer_norm(x, shape, weight, bias, eps)
    return _over_kept(x, -1, gone, lambda y, at: F.layer_norm(y, (len(at),), _rows(weight, at), _rows(bias, at), eps))


def rms_norm(x: Tensor, shape: list[int], weight=None, eps: float | None = None, *, gone: Tensor) -> Tensor:
    """Return the RMSNorm of x [..., C] over its last axis, without the channels `gone`."""
    if not len(gone):
        return aten.rms_norm(x, shape, weight, eps)
    return _over_kept(x, -1, gone, lambda y, at: F.rms_norm(y, (len(at),), _rows(weight, at), eps))


def group_norm(x: Tensor, groups: int, weight=None, bias=None, eps: float = 1e-5, _=True, *, gone: Tensor) -> Tensor:
    """Return the GroupNorm of x [B, C, ...] with a single group, without the channels `gone`."""
    if not len(gone):
        return aten.group_norm(x, groups, weight, bias, eps)
    return _over_kept(x, 1, gone, lambda y, at: F.group_norm(y, groups, _rows(weight, at), _rows(bias, at), eps))


def standardised_weight(x: Tensor, weight, *rest, inputs: int, gone: Tensor) -> Tensor:
    """Standardise a weight x [1, C_out, C_in * kH * kW]: mean 0 and variance 1 of each row over its remaining inputs.

    Weight standardisation, arXiv:1903.10520. `weight` [C_out] is the gain, `inputs` is C_in, `gone` [R] are removed inputs.
    """
    if not len(gone):
        return aten.batch_norm(x, weight, *rest)
    taps = x.shape[2] // inputs
    gone = (gone[:, None] * taps + torch.arange(taps, device=gone.device)).flatten()
    return _over_kept(x, -1, gone, lambda y, at: aten.batch_norm(y, weight, *rest))


def _over_kept(x: Tensor, axis: int, gone: Tensor, norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Apply `norm(x, channels)` to the remaining channels of an axis; return zero at the channels `gone`."""
    kept = torch.ones(x.shape[axis], dtype=torch.bool, device=x.device).index_fill(0, gone.to(x.device), False)
    at = kept.nonzero().squeeze(1)
    return torch.zeros_like(x).index_copy(axis, at, norm(x.index_select(axis, at), at))


def _rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    """Return the entries of an optional gain or bias [C] at the given channels."""
    return None if tensor is None else tensor[index]
