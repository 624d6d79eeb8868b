"""CAMP-HiVe to the letter (`granularity="weight"`): single weights are merged and zeroed. Nothing gets smaller or faster.

It stands here so that the paper can be compared with what cuts channels. Reads and returns weights; the hook that keeps
zeros through training is the one side effect.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hf_camphive.core.runtime import to_float64
from hf_camphive.pruning.scoring.context import ScoringContext
from hf_camphive.pruning.scoring.weight_space import dominant_eigenvector
from hf_camphive.pruning.tuning import CYCLIC_COEFFICIENT

COEFFICIENTS = {
    "cyclic": CYCLIC_COEFFICIENT,
    "none": 0.0,
}  # of a zeroed weight in the one that takes it up, by merge rule


def zero_weights(context: ScoringContext) -> dict[str, Tensor]:
    """New conv and linear weights, of which `sparsity` of each tensor are zero: those of the least |v_i|.

    v is the dominant eigenvector of H in weight space (CAMP-HiVe, arXiv:2511.06265). Deviation: the authors' code zeroes
    norms' gains and biases as well, which empties channels by accident; these stay here.
    """
    config, state = context.config, context.analysis.state
    return {
        name: merge_weights(state[name], v.abs(), config.sparsity, COEFFICIENTS[config.merge])
        for name, v in dominant_eigenvector(context).items()
    }


def merge_weights(weight: Tensor, scores: Tensor, sparsity: float, coefficient: float) -> Tensor:
    """W[t] += coefficient * W[s] for each cyclic pair (s, t), then W[s] = 0, for the floor(sparsity * n) lowest scores.

    Both by descending score, the r-th weight to go meets kept weight r mod K (`planning.cyclic_pairs`, on the entries
    of one tensor). Deviation: the authors' code pairs by position in memory, and at another share than one half lets
    weights receive that go themselves. `scores` has the shape of `weight`; one weight is kept at least.
    """
    size = weight.numel()
    gone = min(int(sparsity * size), size - 1)
    flat = to_float64(weight.detach()).flatten()
    order = scores.to(flat.device).flatten().argsort(descending=True, stable=True)
    kept, removed = order[: size - gone], order[size - gone :]
    merged = flat.index_add(0, kept[torch.arange(gone, device=kept.device) % len(kept)], coefficient * flat[removed])
    return merged.index_fill(0, removed, 0).view(weight.shape).to(weight)


def zero_share(net: nn.Module, names: Iterable[str]) -> float:
    """Share of these weights that is exactly zero."""
    tensors = [net.get_parameter(name) for name in names]
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
