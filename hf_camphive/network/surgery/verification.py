"""Test by experiment, before anything is cut, that the traced coupling of each channel group is right."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_camphive.core.plan import ChannelCut, ChannelGroup, PrunePlan, Slot
from hf_camphive.core.runtime import float64_device, is_out_of_memory, to_float64
from hf_camphive.network.graph.program import TracedProgram, export_graph, named_tensors
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.network.surgery.cutting import State, apply_plan, mask_slot


def check_groups(net: nn.Module, trace: Trace, generator: torch.Generator) -> Trace:
    """Test every group by two experiments; return a trace in which groups that fail are frozen, with the reason.

    Merging: channel r of a group is overwritten by channel k wherever it is produced; then r's column is added to k's
    wherever it is read, and r is overwritten with an arbitrary value. The output must not change. In groups over which norms
    take their statistics, r is masked instead of merged. This runs in float64, with randomised BatchNorm and biases, for
    all groups at once; each group is tested alone only if that fails.

    Cutting: random channels of all groups, then of a random half of the groups, are cut at once. The network's own code
    must run and compute the masked network's function; groups for which it does not are found by bisection.
    """
    free = [group for group in trace.groups if not group.frozen and group.size > 1]
    graph, state = trace.graph, _randomised(net, generator)
    image = torch.randn(1, *trace.input_size, generator=generator, dtype=torch.float64)
    image = image.to(device := float64_device(next(net.parameters()).device))
    if device != next(net.parameters()).device:  # a traced graph runs only on the device on which it was traced
        graph = export_graph(copy.deepcopy(net).to(device), trace.input_size)
    if not _merge_is_lossless(graph, free, state, image, generator):
        bad = {group.name for group in free if not _merge_is_lossless(graph, [group], state, image, generator)}
        trace = _frozen(
            trace, dict.fromkeys(bad, "merging two equal channels moved the output: its coupling is not understood")
        )
    free = [group for group in trace.groups if not group.frozen and group.size > 1]
    faults: dict[str, str] = {}
    _cuttable(net, trace, {}, {group.name: _some_channels(group, generator) for group in free}, faults)
    free = [group for group in free if group.name not in faults]  # next, some groups are cut and others are not
    some = [group for group in free if torch.rand((), generator=generator) < 0.5]
    _cuttable(net, trace, {}, {group.name: _some_channels(group, generator) for group in some}, faults)
    return _frozen(trace, faults)


def _frozen(trace: Trace, reasons: Mapping[str, str]) -> Trace:
    """Return the trace with the named groups frozen for the given reasons."""
    groups = (replace(g, frozen=reasons[g.name]) if g.name in reasons else g for g in trace.groups)
    return replace(trace, groups=tuple(groups))


def _some_channels(group: ChannelGroup, generator: torch.Generator) -> tuple[int, ...]:
    """Return a random, non-empty, proper subset of a group's channels, in ascending order."""
    count = int(torch.randint(1, group.size, (1,), generator=generator))
    return tuple(sorted(torch.randperm(group.size, generator=generator)[:count].tolist()))


Keep = dict[str, tuple[int, ...]]


def _cuttable(net: nn.Module, trace: Trace, base: Keep, more: Keep, faults: dict[str, str]) -> Keep:
    """Return the cuts in `more` that still run on top of `base`; record in `faults` why the others fail.

    Cuts are {group: kept channels}. If all cuts at once fail, each half is tried, recursively.
    """
    if not more:
        return {}
    cuts = tuple(ChannelCut(name, keep) for name, keep in (base | more).items())
    try:
        apply_plan(net, PrunePlan(trace.groups, (), cuts, (), "random", "none", 2, 1), trace)
        return more
    except Exception as error:  # the network's own code may raise anything
        if is_out_of_memory(error):
            raise
        if len(more) == 1:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            faults[next(iter(more))] = (
                f"the network does not run, or computes something else, once it is cut: {reason}"
            )
            return {}
    names = list(more)
    half = len(names) // 2
    first = _cuttable(net, trace, base, {name: more[name] for name in names[:half]}, faults)
    second = _cuttable(net, trace, base | first, {name: more[name] for name in names[half:]}, faults)
    return first | second


def _randomised(net: nn.Module, generator: torch.Generator) -> State:
    """Return the network's state in float64 with every vector (gain, bias, statistics) drawn from [0.5, 1.5).

    Vectors that are initialised with zeros, such as the gain of a block's last norm, would hide errors in a branch.
    """
    state, device = {}, float64_device(next(net.parameters()).device)
    for name, tensor in named_tensors(net).items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            tensor = 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(device)
        state[name] = to_float64(tensor.detach()) if tensor.is_floating_point() else tensor.detach().to(device)
    return state


def _merge_is_lossless(
    graph: TracedProgram, groups: list[ChannelGroup], state: State, image: Tensor, generator: torch.Generator
) -> bool:
    """Return whether merging two equal channels of each group leaves the output unchanged, to 1e-8 (`check_groups`).

    Draws one pair of channels (kept, removed) for each group. Groups over which norms take their statistics are masked at
    the removed channel instead of merged.
    """
    state = dict(state)
    pairs = {group.name: torch.randperm(group.size, generator=generator)[:2].tolist() for group in groups}
    linear = [group for group in groups if all(slot.role != "statistics" for slot in group.slots)]
    for slot, kept, removed in _pair_slots(linear, pairs, image.device, "producer", "affine"):
        tensor = state[slot.tensor].clone()
        tensor.index_copy_(slot.axis, removed, tensor.index_select(slot.axis, kept))
        state[slot.tensor] = tensor
    for group in groups:
        for slot in group.slots if group not in linear else ():
            mask_slot(state, slot, slot.positions([pairs[group.name][1]], group.size))
    with torch.no_grad():
        (before,) = graph.run(state, image)
        for slot, kept, removed in _pair_slots(linear, pairs, image.device, "consumer"):
            tensor = state[slot.tensor].clone()
            tensor.index_add_(slot.axis, kept, tensor.index_select(slot.axis, removed))
            tensor.index_fill_(slot.axis, removed, 0)
            state[slot.tensor] = tensor
        for slot, _, removed in _pair_slots(groups, pairs, image.device, "producer", "affine"):
            tensor = state[slot.tensor].clone()
            tensor.index_fill_(slot.axis, removed, 7.0)
            state[slot.tensor] = tensor
        (after,) = graph.run(state, image)
    return bool((after - before).abs().max() <= 1e-8 * before.abs().max().clamp_min(1e-300))


def _pair_slots(
    groups: list[ChannelGroup], pairs: Mapping[str, list[int]], device: torch.device, *roles: str
) -> Iterable[tuple[Slot, Tensor, Tensor]]:
    """Yield each slot with one of these roles, and the positions of its group's kept and removed channel."""
    for group in groups:
        kept, removed = pairs[group.name]
        for slot in group.slots:
            if slot.role in roles:
                yield (
                    slot,
                    torch.tensor(slot.positions([kept], group.size), device=device),
                    torch.tensor(slot.positions([removed], group.size), device=device),
                )
