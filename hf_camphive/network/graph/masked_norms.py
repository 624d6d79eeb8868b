"""Norms that take their statistics over channels, able to leave some channels out.

A network whose LayerNorm runs over removed channels has no masked counterpart among its own operations: zeros would
count in the mean. These do: without the channels `gone` [R] they compute what the norm over the kept channels alone
computes, and zero elsewhere. With none gone they are the ordinary operations, bit for bit.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def layer_norm(
    x: Tensor, shape: list[int], weight=None, bias=None, eps: float = 1e-5, _=True, *, gone: Tensor
) -> Tensor:
    """LayerNorm of x [..., C] over its last axis."""
    if not len(gone):
        return aten.layer_norm(x, shape, weight, bias, eps)
    return _over_kept(x, -1, gone, lambda y, at: F.layer_norm(y, (len(at),), _rows(weight, at), _rows(bias, at), eps))


def rms_norm(x: Tensor, shape: list[int], weight=None, eps: float | None = None, *, gone: Tensor) -> Tensor:
    """RMSNorm of x [..., C] over its last axis."""
    if not len(gone):
        return aten.rms_norm(x, shape, weight, eps)
    return _over_kept(x, -1, gone, lambda y, at: F.rms_norm(y, (len(at),), _rows(weight, at), eps))


def group_norm(x: Tensor, groups: int, weight=None, bias=None, eps: float = 1e-5, _=True, *, gone: Tensor) -> Tensor:
    """GroupNorm of x [B, C, ...] with a single group."""
    if not len(gone):
        return aten.group_norm(x, groups, weight, bias, eps)
    return _over_kept(x, 1, gone, lambda y, at: F.group_norm(y, groups, _rows(weight, at), _rows(bias, at), eps))


def standardised_weight(x: Tensor, weight, *rest, inputs: int, gone: Tensor) -> Tensor:
    """Weight standardisation: x [1, C_out, C_in * taps] with mean 0 and variance 1 over each row's kept inputs.

    arXiv:1903.10520; `weight` [C_out] is the gain, `gone` [R] are removed inputs.
    """
    if not len(gone):
        return aten.batch_norm(x, weight, *rest)
    taps = x.shape[2] // inputs
    gone = (gone[:, None] * taps + torch.arange(taps, device=gone.device)).flatten()
    return _over_kept(x, -1, gone, lambda y, at: aten.batch_norm(y, weight, *rest))


def _over_kept(x: Tensor, axis: int, gone: Tensor, norm: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    kept = torch.ones(x.shape[axis], dtype=torch.bool, device=x.device).index_fill(0, gone.to(x.device), False)
    at = kept.nonzero().squeeze(1)
    return torch.zeros_like(x).index_copy(axis, at, norm(x.index_select(axis, at), at))


def _rows(tensor: Tensor | None, index: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[index]
