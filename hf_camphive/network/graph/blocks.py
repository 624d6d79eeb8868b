"""Analyse the residual blocks of a traced network.

Finds residual adds, the groups interior to a block, the layer at the end of a branch whose output can be changed freely, and
the branches that can be dropped as a whole. Reads no weight.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from hf_camphive.core.plan import Branch, ChannelGroup
from hf_camphive.network.graph.handlers import ELEMENTWISE
from hf_camphive.network.graph.program import TracedProgram, block_modules, module_of, modules_of, operation
from hf_camphive.network.graph.tracing import Trace

_LINEAR = ("conv2d", "linear")


@dataclass(frozen=True)
class ResidualAdd:
    """A residual add: `add` is the sum of the branch's value `branch` and the shortcut's value `shortcut`."""

    add: fx.Node
    branch: fx.Node
    shortcut: fx.Node


def residual_adds(graph: TracedProgram) -> tuple[ResidualAdd, ...]:
    """Return all residual adds; the operand with more operations that the other one does not use is the branch."""
    ancestry = graph.ancestry
    found = []
    for node in graph.operations:
        operands = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and arg in ancestry]
        if operation(node) != "add" or len(operands) < 2 or operands[0] is operands[1] or _in_implants(node):
            continue
        a, b = operands
        if not ancestry.share(a, b):
            continue
        branch, shortcut = (a, b) if ancestry.count_of_one(a, b) >= ancestry.count_of_one(b, a) else (b, a)
        found.append(ResidualAdd(node, branch, shortcut))
    return tuple(found)


def _in_implants(node: fx.Node) -> bool:
    """Return whether a node runs inside an `ImplantedConv2d`, whose own add is not a residual add."""
    stack = node.meta.get("nn_module_stack") or {}
    return bool(stack) and str(list(stack.values())[-1][1]).endswith("ImplantedConv2d")


def exterior_groups(trace: Trace) -> frozenset[str]:
    """Return the names of the groups between blocks; all other groups are interior to a block.

    A group is interior if all its layers lie in one block (a module that is not just a container) and no residual add
    adds its channels. The result is empty for a network without interior groups, because it has no blocks.
    """
    streams = frozenset().union(*(trace.sums[residual_add.add.name] for residual_add in residual_adds(trace.graph)))
    blocks = block_modules(trace.graph)
    free = [group for group in trace.groups if not group.frozen]
    interior = {group.name for group in free if group.name not in streams and _common_module(group) in blocks}
    return frozenset(group.name for group in free if group.name not in interior) if interior else frozenset()


def _common_module(group: ChannelGroup) -> str:
    """Return the name of the innermost module that holds all layers of a group; "" for the network itself."""
    paths = [slot.tensor.split(".")[:-2] for slot in group.slots]  # without the layer's and the tensor's own names
    common = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def affine_path(residual_add: ResidualAdd) -> list[fx.Node] | None:
    """Return the operations from a branch's last convolution or linear layer to the add, or None.

    All operations after the layer must be batch norms with running statistics (with those of the batch they are not
    affine), dropout or copies, and no other operation may read a value on the path, so that the layer's output can be
    changed freely.
    """
    path: list[fx.Node] = []
    node: Any = residual_add.branch
    while operation(node) not in _LINEAR:
        if operation(node) not in ("batch_norm", "dropout", "clone", "alias") or len(node.users) > 1:
            return None
        if operation(node) == "batch_norm" and node.args[5]:
            return None
        path.insert(0, node)
        node = node.args[0]
    return [node, *path] if len(node.users) == 1 else None


def droppable_branches(trace: Trace) -> tuple[Branch, ...]:
    """Return the residual branches whose module can be replaced by its shortcut plus a constant.

    The module must compute after(shortcut(x) + branch(x)), where `shortcut` and `after` are chains of its own child
    modules, and every path to the branch's output must pass through a layer that reads channels interior to the branch.
    """
    candidates = (_droppable(trace, residual_add) for residual_add in residual_adds(trace.graph))
    return tuple(branch for branch in candidates if branch is not None)


def _droppable(trace: Trace, residual_add: ResidualAdd) -> Branch | None:
    """Return the branch of one residual add as `droppable_branches` describes it, or None if it cannot be dropped."""
    tensors, output, module = trace.graph.tensors, residual_add.branch, module_of(residual_add.add)
    inside = trace.graph.ancestry.of_one(output, residual_add.shortcut)
    if (chains := _chains_around(trace.graph, residual_add, inside)) is None:
        return None
    names = {tensors[used] for node in inside for used in node.all_input_nodes if used in tensors}
    interior = [g for g in trace.groups if all(slot.tensor in names for slot in g.slots)]
    gates = [g.name for g in interior if not g.frozen and _feeds_alone([g], output, inside, tensors)]
    if not gates or not _feeds_alone(interior, output, inside, tensors, pointwise=True):
        return None
    return Branch(
        module=module,
        shortcut=chains[0],
        after=chains[1],
        groups=tuple(group.name for group in interior),
        gates=tuple(gates),
        tensors=tuple(sorted(names)),
        add=residual_add.add.name,
        output=output.name,
    )


def _chains_around(
    graph: TracedProgram, residual_add: ResidualAdd, inside: set[fx.Node]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return the child modules that compute a block's shortcut and those that run after its add, or None.

    `inside` are the branch's own operations. None if the block has other operations, more than one input or other readers
    of the branch's values, or if the shortcut or what follows the add is not a chain of child modules.
    """
    add, module = residual_add.add, module_of(residual_add.add)
    bypass = graph.ancestry.of_one(residual_add.shortcut, residual_add.branch)
    block = [node for node in graph.operations if module and module in modules_of(node)]
    after = [node for node in block if node not in inside | bypass and node is not add]
    sources = {used for node in block for used in node.all_input_nodes} - set(block) - set(graph.tensors)
    if (
        not inside | bypass <= set(block)
        or len(sources) != 1
        or any(user not in inside and user is not add for node in inside for user in node.users)
        or any(not graph.ancestry.depends(node, add) for node in after)
    ):
        return None
    shortcut = _children([node for node in block if node in bypass], module)
    following = _children(after, module)
    return None if shortcut is None or following is None else (shortcut, following)


def operations_inside(graph: TracedProgram, branches: Iterable[Branch]) -> dict[str, str]:
    """Return {operation name: module} of all operations that are removed when the branch of that module is dropped."""
    nodes = {node.name: node for node in graph.operations}
    found: dict[str, str] = {}
    for branch in branches:
        add, output = nodes[branch.add], nodes[branch.output]
        others = [used for used in add.all_input_nodes if used is not output]
        found |= {node.name: branch.module for node in graph.ancestry.of_one(output, *others)}
    return found


def _children(nodes: Sequence[fx.Node], module: str) -> tuple[str, ...] | None:
    """Return the child modules of `module` that run these operations one after the other; None if they are no such chain."""
    names: list[str] = []
    for i, node in enumerate(nodes):
        inner = [name for name in modules_of(node) if name.startswith(module + ".")]
        if not inner or (i and nodes[i - 1] not in node.all_input_nodes):
            return None
        child = inner[0].removeprefix(module + ".")
        if not names or names[-1] != child:
            names.append(child)
    return tuple(names) if len(set(names)) == len(names) else None


def _feeds_alone(
    groups: Iterable[ChannelGroup],
    output: fx.Node,
    inside: set[fx.Node],
    tensors: Mapping[fx.Node, str],
    pointwise: bool = False,
) -> bool:
    """Return whether every path to the branch's output passes through a layer that reads one of these groups.

    With `pointwise`, no operation after that layer may read more than one position: with padding, the output of an emptied
    branch would have another value at the border, so that it would not be a constant.
    """
    consumers = {slot.tensor for group in groups for slot in group.consumers()}
    pending, seen = [output], set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        weights = {tensors[used] for used in node.all_input_nodes if used in tensors}
        if weights & consumers:
            continue
        if node not in inside or (pointwise and not _is_pointwise(node)):
            return False
        pending += [used for used in node.all_input_nodes if used not in tensors]
    return True


def _is_pointwise(node: fx.Node) -> bool:
    """Return whether an operation reads one position only for each position of its result; `mean` over positions counts too."""
    if operation(node) == "conv2d":
        return all(size == 1 for size in node.args[1].meta["val"].shape[2:])
    return operation(node) in (*ELEMENTWISE, "batch_norm", "linear", "mean")
