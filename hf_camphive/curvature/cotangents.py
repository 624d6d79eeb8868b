"""Cotangents: vectors in logit space whose products with Jacobians give gradients and curvature of the cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_camphive.core.runtime import to_float64


def softmax_factors(logits: Tensor, signs: Tensor, count: int) -> Tensor:
    """Vectors z [min(count, K - 1), N, K] with E[sum z z^T] = diag(p) - p p^T, for the softmax p of logits [N, K].

    They are the columns of its Cholesky factor with the likeliest class first: what tells class c from those after it. With
    s_c the probability of class c and all after it, and j any of these,

        z_c = sqrt(p_c s_(c+1) / s_c),   z_j = -p_j sqrt(p_c / (s_c s_(c+1)))

    Where there are more columns than `count`, the last vector stands for all of them that are left: `curvature_cotangent`
    among their classes, times the root of the probability of these.
    """
    p, classes = to_float64(logits).softmax(1).sort(dim=1, descending=True, stable=True)
    columns = count - 1 if count < p.shape[1] - 1 else p.shape[1] - 1
    tiny = torch.finfo(p.dtype).tiny
    vectors = torch.zeros(min(count, p.shape[1] - 1), *p.shape, dtype=p.dtype, device=p.device)
    for c in range(columns):
        rest = p[:, c + 1 :].sum(1)
        vectors[c, :, c] = (p[:, c] * rest / (p[:, c] + rest).clamp_min(tiny)).sqrt()
        vectors[c, :, c + 1 :] = -p[:, c + 1 :] * (vectors[c, :, c] / rest.clamp_min(tiny))[:, None]
    if columns < len(vectors):
        rest = p[:, columns:].sum(1, keepdim=True)
        signed = _signed(p[:, columns:] / rest.clamp_min(tiny), signs.to(p.device).gather(1, classes)[:, columns:])
        vectors[columns, :, columns:] = signed * rest.sqrt()
    return torch.zeros_like(vectors).scatter(2, classes.expand_as(vectors), vectors)


def label_cotangent(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each image's cross-entropy in its logits: p - onehot(label), [N, K]."""
    return logits.softmax(1) - F.one_hot(labels, logits.shape[1])


def curvature_cotangent(logits: Tensor, signs: Tensor, temperature: float = 1.0) -> Tensor:
    """z = (diag(sqrt p) - p sqrt(p)^T) s for random signs s [N, K]: E[z z^T] = diag(p) - p p^T, the curvature R.

    Like drawing a label from the model (z = p - onehot(y), Martens 2020, section 5) it gives R in expectation; but where
    the model is sure, a drawn label is nearly always the same one and says nothing. p = softmax(logits / temperature).
    """
    p = (to_float64(logits) / temperature).softmax(1)
    return _signed(p, signs.to(p.device))


def _signed(p: Tensor, signs: Tensor) -> Tensor:
    s = p.sqrt() * signs
    return s - p * s.sum(1, keepdim=True)
