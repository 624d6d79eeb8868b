"""Blocks: which groups are interior, where residual branches close, which convolution can repair an inherited error, which can be dropped whole.

Pure analysis of a traced network; reads no weight.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from hf_camphive.core.plan import Branch, ChannelGroup
from hf_camphive.network.graph.handlers import ELEMENTWISE
from hf_camphive.network.graph.program import TracedProgram, block_modules, module_of, modules_of, operation
from hf_camphive.network.graph.tracing import Trace

_LINEAR = ("conv2d", "linear")


@dataclass(frozen=True)
class ResidualAdd:
    """A residual add: the branch's value `branch`, the value `shortcut` that it is added to, and their sum `add`."""

    add: fx.Node
    branch: fx.Node
    shortcut: fx.Node


def residual_adds(graph: TracedProgram) -> tuple[ResidualAdd, ...]:
    """All residual adds; the operand with the more operations of its own is the branch."""
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
    """Whether a convolution adds its 1x1 implants to itself here (`ImplantedConv2d`), which makes no residual branch."""
    stack = node.meta.get("nn_module_stack") or {}
    return bool(stack) and str(list(stack.values())[-1][1]).endswith("ImplantedConv2d")


def exterior_groups(trace: Trace) -> frozenset[str]:
    """Names of the groups between blocks; all others are interior to one.

    A group is interior when all its layers lie in one block (a module that is no mere container of modules) and no
    residual add runs through it. Empty for a network without any such group: it has no blocks to tell inside from
    outside by.
    """
    streams = frozenset().union(*(trace.sums[residual_add.add.name] for residual_add in residual_adds(trace.graph)))
    blocks = block_modules(trace.graph)
    free = [group for group in trace.groups if not group.frozen]
    interior = {group.name for group in free if group.name not in streams and _common_module(group) in blocks}
    return frozenset(group.name for group in free if group.name not in interior) if interior else frozenset()


def _common_module(group: ChannelGroup) -> str:
    """The innermost module that holds all layers of a group; "" for the network itself."""
    paths = [slot.tensor.split(".")[:-2] for slot in group.slots]  # without the layer's and the tensor's own names
    common = []
    for parts in zip(*paths):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def affine_path(residual_add: ResidualAdd) -> list[fx.Node] | None:
    """From a branch's last convolution or linear layer to the add, through batch norms only; None if there is none.

    Each value on the way has no other reader, so that the layer's output may be chosen freely. A batch norm counts only
    with running statistics: with those of the batch it is no affine map.
    """
    path, node = [], residual_add.branch
    while operation(node) not in _LINEAR:
        if operation(node) not in ("batch_norm", "dropout", "clone", "alias") or len(node.users) > 1:
            return None
        if operation(node) == "batch_norm" and node.args[5]:
            return None
        path.insert(0, node)
        node = node.args[0]
    return [node, *path] if len(node.users) == 1 else None


def droppable_branches(trace: Trace) -> tuple[Branch, ...]:
    """Residual branches inside a module that can be replaced by its shortcut plus a constant.

    That is: the module computes after(shortcut(x) + branch(x)), where `shortcut` and `after` are chains of its own
    child modules, and some channel group inside the branch is all that feeds the branch's output.
    """
    ancestry, tensors = trace.graph.ancestry, trace.graph.tensors
    found = []
    for residual_add in residual_adds(trace.graph):
        inside = ancestry.of_one(residual_add.branch, residual_add.shortcut)
        bypass = ancestry.of_one(residual_add.shortcut, residual_add.branch)
        module = module_of(residual_add.add)
        block = [node for node in trace.graph.operations if module and module in modules_of(node)]
        after = [node for node in block if node not in inside | bypass and node is not residual_add.add]
        sources = {used for node in block for used in node.all_input_nodes} - set(block) - set(tensors)
        if (
            not inside | bypass <= set(block)
            or len(sources) != 1
            or any(user not in inside and user is not residual_add.add for node in inside for user in node.users)
            or any(not ancestry.depends(node, residual_add.add) for node in after)
        ):
            continue
        ordered = [node for node in block if node in bypass]
        shortcut_children, after_children = _children(ordered, module), _children(after, module)
        if shortcut_children is None or after_children is None:
            continue
        names = {tensors[used] for node in inside for used in node.all_input_nodes if used in tensors}
        interior = [g for g in trace.groups if all(slot.tensor in names for slot in g.slots)]
        gates = [g.name for g in interior if not g.frozen and _feeds_alone([g], residual_add.branch, inside, tensors)]
        if gates and _feeds_alone(interior, residual_add.branch, inside, tensors, pointwise=True):
            found.append(
                Branch(
                    module=module,
                    shortcut=shortcut_children,
                    after=after_children,
                    groups=tuple(group.name for group in interior),
                    gates=tuple(gates),
                    tensors=tuple(sorted(names)),
                    add=residual_add.add.name,
                    output=residual_add.branch.name,
                )
            )
    return tuple(found)


def operations_inside(graph: TracedProgram, branches: Iterable[Branch]) -> dict[str, str]:
    """{operation: module} of all operations that go when the branch of that module is dropped, by name."""
    nodes = {node.name: node for node in graph.operations}
    found = {}
    for branch in branches:
        add, output = nodes[branch.add], nodes[branch.output]
        others = [used for used in add.all_input_nodes if used is not output]
        found |= {node.name: branch.module for node in graph.ancestry.of_one(output, *others)}
    return found


def _children(nodes: Sequence[fx.Node], module: str) -> tuple[str, ...] | None:
    """The child modules of `module` that run these operations one after the other; None where that is not so."""
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
    """Whether every path into the branch's output passes through a layer that reads one of these groups.

    With `pointwise`, also whether nothing after that layer looks beyond one position: padding would give the constant
    that an emptied branch leaves another value at the border.
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
    if operation(node) == "conv2d":
        return all(size == 1 for size in node.args[1].meta["val"].shape[2:])
    return operation(node) in (*ELEMENTWISE, "batch_norm", "linear", "mean")
