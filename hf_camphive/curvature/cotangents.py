"""Vectors in logit space (cotangents) whose products with Jacobians give gradients and curvature of the cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_camphive.core.runtime import to_float64


def softmax_factors(logits: Tensor, signs: Tensor, count: int) -> Tensor:
    """Return vectors z [min(count, K - 1), N, K] with E[sum z z^T] = diag(p) - p p^T, p the softmax of logits [N, K].

    They are the columns of the Cholesky factor of diag(p) - p p^T, classes sorted by falling probability. Let s_c be the
    summed probability of class c and all classes after it. Column c has, for each class j > c,

        z_c = sqrt(p_c s_(c+1) / s_c),   z_j = -p_j sqrt(p_c / (s_c s_(c+1)))

    If there are more columns than `count`, one random vector replaces the columns from `count` on: `curvature_cotangent`
    restricted to their classes, times the square root of the summed probability of these classes. Only this vector uses
    the random signs `signs` [N, K].
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
    """Return the gradient of each image's cross-entropy with respect to its logits: p - onehot(label), [N, K]."""
    return logits.softmax(1) - F.one_hot(labels, logits.shape[1])


def curvature_cotangent(logits: Tensor, signs: Tensor, temperature: float = 1.0) -> Tensor:
    """Return random vectors z [N, K] with E[z z^T] = R = diag(p) - p p^T, the Hessian of the cross-entropy in the logits.

    z = (diag(sqrt p) - p sqrt(p)^T) s for random signs s [N, K] and p = softmax(logits / temperature).

    Deviation: Martens (2020, section 5) draws a label y from the model and takes z = p - onehot(y). Its expectation is R
    too, but where p is nearly one-hot, almost every drawn label is the same and gives z close to 0.
    """
    p = (to_float64(logits) / temperature).softmax(1)
    return _signed(p, signs.to(p.device))


def _signed(p: Tensor, signs: Tensor) -> Tensor:
    """Return (diag(sqrt p) - p sqrt(p)^T) s for each row of p and s, both [N, K]."""
    s = p.sqrt() * signs
    return s - p * s.sum(1, keepdim=True)
