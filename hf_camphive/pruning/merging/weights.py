"""CAMP-HiVe on single weights (`granularity="weight"`): some weights are merged into others and set to zero.

The network becomes neither smaller nor faster. This exists to compare the paper's method with channel pruning. Pure:
reads weights and returns new ones.
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
}  # share of a zeroed weight that is added to its partner, by merge rule


def zero_weights(context: ScoringContext) -> dict[str, Tensor]:
    """Return new convolution and linear weights, in each of which the share `sparsity` with the least |v_i| is zero.

    v is the dominant eigenvector of H in weight space (CAMP-HiVe, arXiv:2511.06265).

    Deviation: the authors' code also zeroes gains and biases of norms, which empties channels by accident; they are kept
    here.
    """
    config, state = context.config, context.analysis.state
    return {
        name: merge_weights(state[name], v.abs(), config.sparsity, COEFFICIENTS[config.merge])
        for name, v in dominant_eigenvector(context).items()
    }


def merge_weights(weight: Tensor, scores: Tensor, sparsity: float, coefficient: float) -> Tensor:
    """Return a tensor whose floor(sparsity * n) weights with the lowest scores are merged into others and zero.

        W[t] += coefficient * W[s],   W[s] = 0      for each cyclic pair (s, t)

    With removed and kept weights each sorted by descending score, removed weight r is paired with kept weight r mod K
    (`rules.cyclic_pairs`, on the entries of one tensor). `scores` has the shape of `weight`; at least one weight is kept.

    Deviation: the authors' code pairs by position in memory, and unless half of the weights are removed, some weights
    that are zeroed receive others.
    """
    size = weight.numel()
    gone = min(int(sparsity * size), size - 1)
    flat = to_float64(weight.detach()).flatten()
    order = scores.to(flat.device).flatten().argsort(descending=True, stable=True)
    kept, removed = order[: size - gone], order[size - gone :]
    merged = flat.index_add(0, kept[torch.arange(gone, device=kept.device) % len(kept)], coefficient * flat[removed])
    return merged.index_fill(0, removed, 0).view(weight.shape).to(weight)


def zero_share(net: nn.Module, names: Iterable[str]) -> float:
    """Return the share of the parameters `names` of `net` that is exactly zero, in [0, 1]."""
    tensors = [net.get_parameter(name) for name in names]
    return sum(int((tensor == 0).sum()) for tensor in tensors) / sum(tensor.numel() for tensor in tensors)
