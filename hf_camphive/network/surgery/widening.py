"""Widen a network without changing its function, so that it can be trained further and pruned again.

SOSP (arXiv:2110.11395) widens the bottlenecks that a first pruning shows. The method is that of Net2WiderNet (Chen et al.,
ICLR 2016, arXiv:1511.05641): a channel is split into copies, and every layer that reads it reads a share of each copy.
"""

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from hf_camphive.core.errors import PlanError, did_you_mean
from hf_camphive.core.plan import ChannelGroup, Slot
from hf_camphive.core.records import RecordFormat
from hf_camphive.core.runtime import float64_device, to_float64
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.network.modeling.resizing import shortcuts_of
from hf_camphive.network.surgery.cutting import rebuilt

EXPANSION_FILE = "expansion.json"
FORMAT = RecordFormat(EXPANSION_FILE, PlanError)
_TOLERANCE = 1e-8  # relative, in float64


@dataclass(frozen=True)
class Widening:
    """The widening of a group of `size` channels: new channel i is a copy of channel `sources[i]`.

    Layers that read the group read new channel i with `shares[i]` times the old weight; the shares of one channel's copies
    sum to 1. The copies of a channel are adjacent, so `sources` ascends.
    """

    group: str
    size: int
    sources: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def originals(self) -> tuple[int, ...]:
        """The first copy of each channel; merging all other copies into these restores the original network."""
        return tuple(i for i, source in enumerate(self.sources) if i == 0 or self.sources[i - 1] != source)


@dataclass(frozen=True)
class Expansion:
    """The record of a widening, saved beside the widened network; MACs are per image (1 MAC = 2 FLOPs)."""

    model_id: str
    license: str | None
    factor: float
    spread: float
    seed: int
    macs_before: int
    macs_after: int
    parameters_before: int
    parameters_after: int
    widenings: tuple[Widening, ...]

    def to_json(self) -> str:
        """Return the text of `expansion.json`."""
        return FORMAT.write(asdict(self))


def expand(
    net: nn.Module,
    trace: Trace,
    factor: float = 2.0,
    groups: Iterable[str] | None = None,
    *,
    spread: float = 0.2,
    seed: int = 0,
) -> tuple[nn.Module, tuple[Widening, ...]]:
    """Return a copy of the network in which each named group has `factor` times its channels, and the widenings.

    By default all groups that are not frozen are widened. y = sum_c W[:, c] x_c becomes sum_c sum_i (a_ci W[:, c]) x_c with
    sum_i a_ci = 1 (Net2WiderNet, arXiv:1511.05641).

    Deviation: Net2WiderNet uses equal shares a_ci, and adds noise to the copies so that training tells them apart, which
    changes the function. Here the shares differ by up to `spread` (relative), so that the copies' gradients differ while the
    function is unchanged. With `spread` 0 the copies stay equal during training.

    Raises:
        PlanError: A group is unknown or frozen, its copies would change the output, the network cannot have these widths,
            or `factor` or `spread` is out of range.
    """
    chosen = _chosen(trace.groups, groups)
    widenings = draw_widenings(chosen, factor, spread, seed)
    wide = widened(net, trace.groups, widenings)
    if not _same_function(net, wide, trace.input_size):
        bad = [
            w.group for w in widenings if not _same_function(net, widened(net, trace.groups, [w]), trace.input_size)
        ]
        raise PlanError(
            f"splitting the channels of {', '.join(bad) or 'these groups together'} moves the output: how they are "
            "coupled is not understood; name other groups"
        )
    return wide, widenings


def draw_widenings(
    groups: Sequence[ChannelGroup], factor: float, spread: float = 0.2, seed: int = 0
) -> tuple[Widening, ...]:
    """Draw the channels to copy in each group, and the shares of the copies; the result depends on `seed` alone.

    A group of C channels grows to round(factor * C), by at least one channel. No channel is copied a second time before
    every channel has been copied once.

    Raises:
        PlanError: `factor` is not above 1, or `spread` is not in [0, 1).
    """
    if not factor > 1:
        raise PlanError(f"factor is {factor}; widening needs one above 1, such as 2")
    if not 0 <= spread < 1:
        raise PlanError(
            f"spread is {spread}; shares may differ by a fraction from 0 up to, but not including, 1, such as 0.2"
        )
    generator = torch.Generator().manual_seed(seed)
    return tuple(_draw(group, factor, spread, generator) for group in groups)


def widened(net: nn.Module, groups: Iterable[ChannelGroup], widenings: Iterable[Widening]) -> nn.Module:
    """Return a copy of the network with these groups widened, without checking that its function is unchanged.

    Raises:
        PlanError: The layers of the widened network do not fit one another.
    """
    named = {group.name: group for group in groups}
    layouts: dict[tuple[str, int], dict[int, tuple[int, list[float]]]] = defaultdict(dict)
    consumed: set[tuple[str, int]] = set()
    for widening in widenings:
        group = named[widening.group]
        shares: list[list[float]] = [[] for _ in range(group.size)]
        for source, share in zip(widening.sources, widening.shares):
            shares[source].append(share)
        for slot in group.slots:
            for channel, start, length in _blocks(group, slot):
                layouts[slot.tensor, slot.axis][start] = (length, shares[channel])
            if slot.role == "consumer":
                consumed.add((slot.tensor, slot.axis))
    tensors = dict(named_tensors(net))
    for (name, axis), blocks in layouts.items():
        tensors[name] = _split(tensors[name], axis, blocks, scaled=(name, axis) in consumed)
    try:
        return rebuilt(net, tensors, shortcuts_of(net))
    except ValueError as error:
        raise PlanError(f"the network cannot have these widths ({error}); name other groups") from error


def _chosen(groups: Sequence[ChannelGroup], names: Iterable[str] | None) -> list[ChannelGroup]:
    """Return the named groups, or all that are not frozen if `names` is None.

    Raises:
        PlanError: A group is unknown or frozen.
    """
    known = {group.name: group for group in groups}
    if names is None:
        return [group for group in groups if not group.frozen]
    names = set(names)
    for name in sorted(names):
        if name not in known:
            hint = did_you_mean(name, known, otherwise=f"it has {', '.join(known)}")
            raise PlanError(f"the network has no channel group {name!r}; {hint}")
        if known[name].frozen:
            raise PlanError(f"group {name!r} cannot be widened: {known[name].frozen}")
    return [group for group in groups if group.name in names]


def _draw(group: ChannelGroup, factor: float, spread: float, generator: torch.Generator) -> Widening:
    """Draw the widening of one group (`draw_widenings`)."""
    extra = max(1, round(factor * group.size) - group.size)
    copies = [1 + extra // group.size] * group.size
    for channel in torch.randperm(group.size, generator=generator)[: extra % group.size].tolist():
        copies[channel] += 1
    sources, shares = [], []
    for channel, count in enumerate(copies):
        raw = 1 + spread * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)
        part = (raw / raw.sum()).tolist()
        sources += [channel] * count
        shares += [*part[1:], 1 - sum(part[1:])]
    return Widening(group.name, group.size, tuple(sources), tuple(shares))


def _blocks(group: ChannelGroup, slot: Slot) -> Iterable[tuple[int, int, int]]:
    """Yield (channel, first position, length) for each run of a slot's positions that is copied as a whole.

    A channel that is flattened before it is read has a run of positions, which is copied as a whole. In tied convolution
    groups a channel has one position in each of them; each position is copied separately, next to itself.
    """
    repeat = len(slot.index) // group.size
    tied = min((len(s.index) // group.size for s in group.slots if s.role != "consumer"), default=1)
    run = max(1, repeat // tied)
    for channel in range(group.size):
        positions = sorted(slot.index[channel * repeat : (channel + 1) * repeat])
        for first in range(0, repeat, run):
            block = positions[first : first + run]
            if block[-1] - block[0] == len(block) - 1:
                yield channel, block[0], len(block)
            else:
                yield from ((channel, position, 1) for position in block)


def _split(tensor: Tensor, axis: int, blocks: Mapping[int, tuple[int, list[float]]], scaled: bool) -> Tensor:
    """Return the tensor with each block repeated along an axis, once for each share, and times the share if `scaled`.

    `blocks` is {first position: (length, shares)}; positions in no block are kept as they are.
    """
    order: list[int] = []
    scale: list[float] = []
    position = 0
    while position < tensor.shape[axis]:
        length, shares = blocks.get(position, (1, [1.0]))
        for share in shares:
            order += range(position, position + length)
            scale += [share] * length
        position += length
    split = tensor.detach().index_select(axis, torch.tensor(order, device=tensor.device))
    if scaled:
        exact = to_float64(split)
        factors = torch.tensor(scale, dtype=torch.float64, device=exact.device)
        split = (exact * factors.view([-1 if i == axis else 1 for i in range(split.dim())])).to(split)
    return split


def _same_function(net: nn.Module, wide: nn.Module, input_size: tuple[int, int, int]) -> bool:
    """Return whether two networks agree on a random image, in float64, up to the rounding of the weights' own precision."""
    example = next(net.parameters())
    device = float64_device(example.device)
    image = torch.randn(1, *input_size, generator=torch.Generator().manual_seed(0)).to(device).double()
    with torch.no_grad():
        a, b = (copy.deepcopy(each).to(device).double().eval()(image) for each in (net, wide))
    rounding = max(_TOLERANCE, 1e3 * torch.finfo(example.dtype).eps)
    return bool((a - b).abs().max() <= rounding * a.abs().max().clamp_min(1e-300))
