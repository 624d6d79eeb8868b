"""How far a plan may narrow each channel group: scope, floors, layers kept by name, largest share removed.

Pure: reads groups and settings, and turns name patterns into numbers of channels.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from math import ceil

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError, did_you_mean
from hf_camphive.core.plan import Branch, ChannelGroup


def floors(
    groups: Iterable[ChannelGroup],
    branches: Iterable[Branch],
    exterior: frozenset[str],
    sizes: Mapping[str, int],
    config: CampHiVeConfig,
) -> dict[str, int]:
    """Return the fewest channels of each group that may be pruned; groups that must stay whole are absent.

    Frozen groups, groups outside the scope and groups of a layer that matches `config.keep` stay whole. A floor of 0
    marks a gate of a residual branch that may be dropped. `sizes` are the widths that ratios refer to (those before the
    first cycle).

    Raises:
        ConfigError: A pattern matches no layer.
    """
    groups = tuple(groups)
    layers = sorted({_layer(slot.tensor) for group in groups for slot in group.slots})
    kept = _kept_layers(layers, config.keep)
    most = _most_ratio(layers, config)
    free = {
        group.name: group
        for group in groups
        if not group.frozen
        and (config.scope == "all" or group.name not in exterior)
        and not any(_layer(slot.tensor) in kept for slot in group.slots)
    }
    least = {name: _least(group, sizes.get(name, group.size), most) for name, group in free.items()}
    gates: set[str] = set()
    stuck = {group.name for group in groups if not group.frozen and least.get(group.name, 1) > 0}
    for branch in branches:
        if stuck.isdisjoint(branch.groups) and kept.isdisjoint(map(_layer, branch.tensors)):
            gates |= set(branch.gates)
    return {
        name: 0 if name in gates else min(group.size, max(least[name], config.min_channels))
        for name, group in free.items()
    }


def _least(group: ChannelGroup, size: int, most: Mapping[str, float]) -> int:
    """Return the fewest channels under the ratio limits of the layers that produce or scale the group."""
    ratio = min(most[_layer(slot.tensor)] for slot in group.slots if slot.role != "consumer")
    return min(group.size, ceil(round((1 - ratio) * size, 6)))


def _kept_layers(layers: list[str], patterns: Iterable[str]) -> frozenset[str]:
    """Return the layers that match any of the patterns of `keep`.

    Raises:
        ConfigError: A pattern matches no layer.
    """
    return frozenset(layer for pattern in patterns for layer in _matching(layers, pattern, "keep"))


def _most_ratio(layers: list[str], config: CampHiVeConfig) -> dict[str, float]:
    """Return the share of its channels that each layer may lose, in [0, 1].

    It is the least ratio among the patterns of `layer_max_ratio` that match the layer, else `max_ratio`.

    Raises:
        ConfigError: A pattern matches no layer.
    """
    special: dict[str, float] = {}
    for pattern, ratio in config.layer_max_ratio.items():
        for layer in _matching(layers, pattern, "layer_max_ratio"):
            special[layer] = min(ratio, special.get(layer, 1.0))
    return {layer: special.get(layer, config.max_ratio) for layer in layers}


def _matching(layers: list[str], pattern: str, option: str) -> list[str]:
    """Return the layers that match a pattern of the setting `option`.

    Raises:
        ConfigError: The pattern matches no layer.
    """
    found = [layer for layer in layers if fnmatchcase(layer, pattern)]
    if not found:
        hint = did_you_mean(pattern, layers, otherwise=f"its layers have names such as {layers[0]!r}")
        raise ConfigError(f"{option}: no layer of this network matches {pattern!r}; {hint} (see `camphive inspect`)")
    return found


def _layer(tensor: str) -> str:
    """Return the name of the module that holds a tensor."""
    return tensor.rpartition(".")[0]
