"""How much a loss counts by depth, since later layers repair part of what early ones get wrong.

Scores judge a merge by what it does to the network as it is. Reconstruction then fits every later layer to the dense
network's values, and takes part of an early error away again. How much of it depends on the network, and is found by trial.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from hf_camphive.core.plan import ChannelGroup
from hf_camphive.pruning.tuning import EARLY_WEIGHTS, MIN_IMPROVEMENT


def weighed(scores: Mapping[str, Tensor], groups: Sequence[ChannelGroup], early_weight: float) -> dict[str, Tensor]:
    """score * early_weight^(1 - d), where d goes from 0 for the first group to 1 for the last; scores are [C] each."""
    last = max(len(groups) - 1, 1)
    depths = {group.name: place / last for place, group in enumerate(groups)}
    return {name: values * early_weight ** (1 - depths[name]) for name, values in scores.items()}


def best_early_weight(loss: Callable[[float], float]) -> float:
    """The weight of the first group's scores: 1, and a quarter of it as long as that lowers the loss by a tenth."""
    best, least = 1.0, loss(1.0)
    for weight in EARLY_WEIGHTS:
        found = loss(weight)
        if not found <= MIN_IMPROVEMENT * least:
            break
        best, least = weight, found
    return best
