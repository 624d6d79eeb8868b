"""Weights of scores by depth, which account for the errors that reconstruction repairs in later layers.

A score estimates the effect of a merge on the network as it is. Reconstruction then refits every later layer to the
dense network's values, which removes part of an error made early. How large that part is differs between networks, so
the weight is chosen by trial merges.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from hf_camphive.core.plan import ChannelGroup
from hf_camphive.pruning.tuning import EARLY_WEIGHTS, MIN_IMPROVEMENT


def weighed(scores: Mapping[str, Tensor], groups: Sequence[ChannelGroup], early_weight: float) -> dict[str, Tensor]:
    """Multiply each group's scores [C] by early_weight^(1 - d), d from 0 for the first of `groups` to 1 for the last."""
    last = max(len(groups) - 1, 1)
    depths = {group.name: place / last for place, group in enumerate(groups)}
    return {name: values * early_weight ** (1 - depths[name]) for name, values in scores.items()}


def best_early_weight(loss: Callable[[float], float]) -> float:
    """Return the weight of the first group's scores, relative to the last group's, that trial merges choose.

    `loss(weight)` is the loss of a trial merge planned with that weight. Starting from 1, each weight of
    `EARLY_WEIGHTS` (1/4, then 1/16) is taken if its loss is at most `MIN_IMPROVEMENT` (0.9) times the least loss so
    far; the search stops at the first that is not, or whose loss is NaN.
    """
    best, least = 1.0, loss(1.0)
    for weight in EARLY_WEIGHTS:
        found = loss(weight)
        if not found <= MIN_IMPROVEMENT * least:
            break
        best, least = weight, found
    return best
