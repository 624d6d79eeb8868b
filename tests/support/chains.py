"""Networks that planning knows by their shapes alone."""

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.plan import ChannelGroup, Slot
from hf_camphive.pruning.planning.costs import CostModel


def config(**changes) -> CampHiVeConfig:
    return CampHiVeConfig(**{"scope": "all"} | changes)


def group(name: str, size: int, writes: str, reads: str, frozen: str | None = None, repeat: int = 1) -> ChannelGroup:
    """Channels that `writes` produces (axis 0) and `reads` consumes (axis 1, `repeat` positions a channel)."""
    slots = (
        Slot(f"{writes}.weight", 0, "producer", tuple(range(size))),
        Slot(f"{reads}.weight", 1, "consumer", tuple(range(size * repeat))),
    )
    return ChannelGroup(name, size, slots, frozen)


def chain(*widths: int, positions: tuple[int, ...] = (), kernel: int = 1) -> CostModel:
    """conv0: widths[0] -> widths[1], conv1: -> widths[2], ...; input and output fixed; groups g1, g2, ..."""
    layers = len(widths) - 1
    shapes = {f"conv{i}.weight": (widths[i + 1], widths[i], kernel, kernel) for i in range(layers)}
    groups = [group(f"g{i}", widths[i], f"conv{i - 1}", f"conv{i}") for i in range(1, layers)]
    counts = dict(zip(shapes, positions or (1,) * layers, strict=True))
    return CostModel(tuple(groups), (), frozenset(), counts, shapes)
