"""Apply a pruning plan: `mask_state` masks channels at full width, `apply_plan` removes them from the network.

Both must compute the same function; `apply_plan` checks that on every network before it returns. No other module slices
channels, except that `implants.py` splits the kernels of implants off first.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from hf_camphive.core.errors import PlanError
from hf_camphive.core.plan import Branch, PrunePlan, Slot
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.network.modeling.resizing import Shortcuts, resize, shortcuts_of, widths_of
from hf_camphive.network.modes import keeping_modes
from hf_camphive.network.surgery.implants import implanted_slots, split_off_implants, with_centres

State = dict[str, Tensor]
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}  # relative difference of logits


def mask_state(state: Mapping[str, Tensor], plan: PrunePlan) -> State:
    """Return the weights that apply a plan at full width: consumers ignore removed channels, all else is unchanged.

    W[:, c] = 0 for each removed channel c of each consumer W [C_out, C_in, ...]. The kernels [kH, kW] that produce or read
    an implanted channel keep their centre only. Norms whose statistics run over channels leave the removed ones out
    (`masked_norms`). `state` is `named_tensors(net)`.
    """
    masked = dict(state)
    for slot, removed in _removed(plan):
        mask_slot(masked, slot, removed)
    for slot, positions in implanted_slots(plan):
        masked[slot.tensor] = with_centres(masked[slot.tensor], slot.axis, positions)
    return masked


def mask_slot(masked: State, slot: Slot, removed: list[int]) -> None:
    """Mask the positions `removed` of one slot, in place: zero a consumer's weights, or leave them out of statistics."""
    if slot.role == "consumer":
        weight = masked[slot.tensor].clone()
        weight.index_fill_(slot.axis, torch.tensor(removed, device=weight.device), 0)
        masked[slot.tensor] = weight
    elif slot.role == "statistics":
        before = masked.get(slot.tensor, torch.empty(0, dtype=torch.long))
        masked[slot.tensor] = torch.cat([before.cpu(), torch.tensor(removed, dtype=torch.long)]).unique()


def apply_plan(net: nn.Module, plan: PrunePlan, trace: Trace, state: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a copy of the network without the removed channels and dropped branches; `net` is not changed.

    `trace` is the trace of `net` for which the plan was made. `state` holds full-width weights to cut instead of the
    network's own, such as merged ones. Device, dtype, memory format, training mode and requires_grad are kept.

    Raises:
        PlanError: The plan does not fit the network, an emptied branch is not constant, or the result does not compute the
            masked network's function.
        ValueError: A layer cannot have the width that the plan leaves (`resize`).
    """
    state = named_tensors(net) if state is None else state
    _check_fits(state, plan)
    state = mask_state(state, plan)
    constants = _branch_constants(trace, plan, state)
    small = _shrunk(net, plan, trace, state, constants)
    _check_same_function(trace, plan, state, small)
    return small


# Removed positions


def _removed(plan: PrunePlan) -> Iterable[tuple[Slot, list[int]]]:
    """Yield each slot that loses positions, and these positions."""
    groups = {group.name: group for group in plan.groups}
    for cut in plan.cuts:
        group = groups[cut.group]
        stay = {*cut.keep, *cut.implants}
        channels = [c for c in range(group.size) if c not in stay]
        for slot in group.slots:
            if removed := slot.positions(channels, group.size):
                yield slot, removed


def _check_fits(state: Mapping[str, Tensor], plan: PrunePlan) -> None:
    """Check that the state has every tensor axis that the plan's groups refer to.

    Raises:
        PlanError: A tensor is missing, or too small.
    """
    for group in plan.groups:
        for slot in group.slots:
            if slot.role == "statistics":
                continue
            tensor = state.get(slot.tensor)
            if tensor is None or tensor.dim() <= slot.axis or tensor.shape[slot.axis] <= max(slot.index):
                found = "absent" if tensor is None else f"of shape {list(tensor.shape)}"
                raise PlanError(
                    f"group {group.name!r} expects axis {slot.axis} of {slot.tensor} to hold {max(slot.index) + 1} "
                    f"positions, but that tensor is {found}; the plan was made for another network"
                )


# Cutting


def _shrunk(net: nn.Module, plan: PrunePlan, trace: Trace, state: State, constants: Mapping[str, Tensor]) -> nn.Module:
    """Return the cut copy of a network.

    `state` holds the masked full-width weights, `constants` the constant [C] that replaces each dropped branch.
    """
    branches = {branch.module: branch for branch in plan.branches}
    remaining = _remaining(plan, state)
    cut: State = {}
    for name, traced in _names_in_graph(net, trace).items():
        tensor = state[traced]
        for axis in range(tensor.dim()):
            if (positions := remaining.get((traced, axis))) is not None:
                tensor = tensor.index_select(axis, torch.tensor(positions, dtype=torch.long, device=tensor.device))
        cut[name] = tensor
    for module in plan.dropped:
        for name in [name for name in cut if _vanishes(name, branches[module])]:
            del cut[name]
        cut[f"{module}.constant"] = _cut_constant(constants[module], branches[module], plan)

    shortcuts = shortcuts_of(net)
    for module in plan.dropped:
        shortcuts[module] = {"shortcut": list(branches[module].shortcut), "after": list(branches[module].after)}
    return rebuilt(net, split_off_implants(cut, plan), shortcuts, _changed_numbers(net, trace, plan))


def _remaining(plan: PrunePlan, state: Mapping[str, Tensor]) -> dict[tuple[str, int], list[int]]:
    """Return {(tensor, axis): old positions that remain, in their new order} for each axis that the plan changes.

    A group's implants are moved behind its other channels.
    """
    # For each axis: {position: the position that takes its place, or None if nothing does}.
    homes: dict[tuple[str, int], dict[int, int | None]] = defaultdict(dict)
    groups = {group.name: group for group in plan.groups}
    for cut in plan.cuts:
        group = groups[cut.group]
        for slot in group.slots:
            stay = slot.positions(cut.keep, group.size) + slot.positions(cut.implants, group.size)
            homes[slot.tensor, slot.axis] |= dict.fromkeys(slot.index) | dict(zip(sorted(stay), stay))
    return {
        (name, axis): [
            position for place in range(state[name].shape[axis]) if (position := home.get(place, place)) is not None
        ]
        for (name, axis), home in homes.items()
    }


def rebuilt(
    net: nn.Module,
    tensors: Mapping[str, Tensor],
    shortcuts: Shortcuts,
    numbers: Mapping[str, Mapping[str, int | list[int]]] | None = None,
) -> nn.Module:
    """Return a copy of the network whose layers have the widths of the given tensors, and hold these tensors.

    `shortcuts` names the blocks that become shortcuts, with the children that they keep; `numbers` gives new values of
    module attributes, {module: {attribute: value}}.

    Raises:
        PlanError: The tensors are not those of the resized network, by name or by shape.
        ValueError: A layer cannot have the width of its tensor (`resize`).
    """
    copied = copy.deepcopy(net)
    widths = {}
    implants = [name.removesuffix(".weight") for name in tensors if name.endswith((".reads.weight", ".makes.weight"))]
    for name in dict.fromkeys([*widths_of(net), *shortcuts, *implants]):
        held = next((tensors[key] for key in (f"{name}.constant", f"{name}.weight", name) if key in tensors), None)
        if held is not None:
            widths[name] = list(held.shape)
    resize(copied, widths, shortcuts, numbers)
    if _is_channels_last(net):
        copied = copied.to(memory_format=torch.channels_last)
    with torch.no_grad():
        places = named_tensors(copied)
        if missing := places.keys() ^ tensors.keys():
            raise PlanError(f"cutting left tensors {sorted(missing)[:5]} on one side only; please report this network")
        for name, tensor in places.items():
            if tensor.shape != tensors[name].shape:
                raise PlanError(
                    f"{name} should have shape {list(tensors[name].shape)} after the cut but has {list(tensor.shape)}; "
                    "please report this network"
                )
            tensor.copy_(tensors[name])
    return copied


def _names_in_graph(net: nn.Module, trace: Trace) -> dict[str, str]:
    """Return {name of a tensor in the network: its name in the graph}; a shared tensor has only one name in the graph."""
    used = {name for node, name in trace.graph.tensors.items() if node.users}
    names: dict[int, str] = {}
    for name, tensor in named_tensors(net).items():
        if name in used or id(tensor) not in names:
            names[id(tensor)] = name
    return {name: names[id(tensor)] for name, tensor in named_tensors(net).items()}


def _changed_numbers(net: nn.Module, trace: Trace, plan: PrunePlan) -> dict[str, dict[str, int | list[int]]]:
    """Return new values of module attributes that count channels, such as `num_heads` or the sizes of a split.

    The result is {module: {attribute: new value}}. The trace records the numbers of channels that occur in the operations
    of each module (`Count`), from which their values after the cut follow. An attribute with the same value as such a
    number is taken to be the same quantity, and gets its new value:

    - a number that is an argument of an operation ("written") applies to every attribute of the module;
    - the size of a value applies only to attributes that are named like a width (`_NAMES_OF_WIDTHS`), with sizes of the
      module's inputs preferred if the name starts with "in".

    Numbers with several possible new values are skipped, and so is `num_classes`. These rules are heuristic: `check_groups`
    and `apply_plan` verify that the cut network computes the masked network's function.
    """
    found: dict[str, dict[str, dict[int, set[int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(set)))
    for count in trace.counts:
        found[count.module][count.kind][count.number].add(count.after(plan.keep))
    sized = widths_of(net)
    changed: dict[str, dict[str, int | list[int]]] = {}
    for name, module in net.named_modules():
        if name not in found or name in sized:
            continue
        written = {old: min(after - {old}) for old, after in found[name]["written"].items() if len(after - {old}) == 1}
        inputs, sizes = (
            {o: min(after) for o, after in found[name][k].items() if len(after) == 1} for k in ("input", "size")
        )
        for key, value in vars(module).items():
            new = written
            if _NAMES_OF_WIDTHS.search(key):
                new = sizes | inputs | written if key.startswith("in") else inputs | sizes | written
            if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
                held: list[int] = list(value)
                if (values := [new.get(v, v) for v in held]) != held:
                    changed.setdefault(name, {})[key] = values
            elif type(value) is int and new.get(value, value) != value and key != "num_classes":
                changed.setdefault(name, {})[key] = new[value]
    return changed


_NAMES_OF_WIDTHS = re.compile("channel|chs|dim|width|features|heads|planes|filters")


def _is_channels_last(net: nn.Module) -> bool:
    """Return whether any weight is stored in channels_last."""
    return any(
        tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        for tensor in net.parameters()
    )


def _vanishes(name: str, branch: Branch) -> bool:
    """Return whether a tensor belongs to a dropped block, but to none of the children that remain."""
    stays = tuple(f"{branch.module}.{child}." for child in (*branch.shortcut, *branch.after))
    return name.startswith(branch.module + ".") and not name.startswith(stays)


def _cut_constant(constant: Tensor, branch: Branch, plan: PrunePlan) -> Tensor:
    """Return the constant [C] of a dropped branch, without the removed channels of the residual stream."""
    for group in plan.groups:
        produced = any(slot.tensor in branch.tensors and slot.axis == 0 for slot in group.slots)
        if produced and group.name not in branch.groups and group.size == len(constant):
            return constant[list(plan.remain[group.name])]
    return constant


def _branch_constants(trace: Trace, plan: PrunePlan, masked: State) -> dict[str, Tensor]:
    """Return the constant [C] that each dropped branch adds once all of its interior channels are masked, by module.

    Raises:
        PlanError: The output of a masked branch differs between positions.
    """
    if not plan.dropped:
        return {}
    nodes = {node.name: node for node in trace.graph.operations}
    branches = {branch.module: branch for branch in plan.branches}
    outputs = [nodes[branches[module].output] for module in plan.dropped]
    example = next(iter(masked.values()))
    image = torch.zeros(1, *trace.input_size, dtype=example.dtype, device=example.device)
    with torch.no_grad():
        values = trace.graph.run(masked, image, outputs)
    constants = {}
    for module, value in zip(plan.dropped, values):
        flat = value[0].flatten(1)
        spread = (flat.amax(1) - flat.amin(1)).max()
        if spread > 1e-5 * (1 + flat.abs().max()):
            raise PlanError(
                f"the emptied branch of {module} is not constant (spread {spread:.2e}); keep it with min_channels"
            )
        constants[module] = flat.mean(1)
    return constants


# Checks


def _check_same_function(trace: Trace, plan: PrunePlan, masked: State, small: nn.Module) -> None:
    """Check on one random image that the cut network computes the same logits as the masked one.

    Raises:
        PlanError: The relative difference exceeds the tolerance for the dtype.
    """
    example = next(small.parameters())
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, *trace.input_size, generator=generator).to(example.device, example.dtype)
    with keeping_modes(small), torch.no_grad():
        (expected,) = trace.graph.run(masked, image)
        found = small.eval()(image)
    error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error <= _TOLERANCE.get(example.dtype, 1e-1):
        raise PlanError(
            f"the cut network differs from the masked one (relative error {error:.1e}); nothing was saved; "
            "please report this network, and prune it with --scope interior meanwhile if that was not set"
        )
