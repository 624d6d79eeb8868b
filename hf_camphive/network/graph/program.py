"""Export a network as a flat, functional list of tensor operations (`torch.export`) that can be run node by node.

Tracing reads this list to couple channels; merging runs it on the dense and the masked weights side by side. Weights are not
changed. The only operations that are replaced are norms whose statistics run over channels (`masked_norms`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from hf_camphive.core.errors import ModelError
from hf_camphive.core.runtime import is_out_of_memory
from hf_camphive.network.graph import masked_norms as norms
from hf_camphive.network.modes import keeping_modes

aten = torch.ops.aten
REMOVED_SUFFIX = "#gone"  # "<weight>#gone" [R]: channels that the statistics of that weight's norm leave out
Values = dict[fx.Node, Any]  # tensors, lists of tensors or sizes


@dataclass(frozen=True)
class TracedProgram:
    """Operations of a network in execution order.

    `tensors` maps the placeholders of parameters and buffers to their names in the network, `image` is the input
    [N, C, H, W], `logits` the value that the network returns. `constants` are the constant tensors of the program. They
    include an empty "<weight>#gone" for each norm over channels; a state may give another value under that name.
    """

    nodes: tuple[fx.Node, ...]
    tensors: Mapping[fx.Node, str]
    constants: Mapping[fx.Node, Tensor]
    image: fx.Node
    logits: fx.Node

    @cached_property
    def operations(self) -> tuple[fx.Node, ...]:
        """The nodes that compute something, in execution order."""
        return tuple(node for node in self.nodes if node.op == "call_function")

    @cached_property
    def ancestry(self) -> "Ancestry":
        """The operations that each value is computed from."""
        return Ancestry(self)

    def bind(self, state: Mapping[str, Tensor]) -> Values:
        """Return the values of all placeholders but the image, from a full state (`named_tensors`)."""
        given = {
            node: state[name] for node, name in self.tensors.items() if name in state or node not in self.constants
        }
        return dict(self.constants) | given

    def run(self, state: Mapping[str, Tensor], image: Tensor, wanted: Iterable[fx.Node] | None = None) -> list[Tensor]:
        """Run the network with these weights on `image` [N, C, H, W]; return the values of the wanted nodes (the logits)."""
        wanted = [self.logits] if wanted is None else list(wanted)
        last_use = {used: node for node in self.operations for used in node.all_input_nodes}
        values = self.bind(state) | {self.image: image}
        for node in self.operations:
            values[node] = compute(node, values)
            for used in node.all_input_nodes:
                if last_use[used] is node and used not in wanted:
                    del values[used]
        return [values[node] for node in wanted]


class Ancestry:
    """The ancestors of each value: the operations, and the image, that it is computed from, including itself.

    They are stored as one bit set for each value.
    """

    def __init__(self, program: TracedProgram) -> None:
        self.nodes = (program.image, *program.operations)
        self._masks: dict[fx.Node, int] = {}
        for place, node in enumerate(self.nodes):
            mask = 1 << place
            for used in node.all_input_nodes:
                mask |= self._masks.get(used, 0)
            self._masks[node] = mask

    def __contains__(self, value: object) -> bool:
        return value in self._masks

    def share(self, a: fx.Node, b: fx.Node) -> bool:
        """Return whether two values have an ancestor in common."""
        return bool(self._masks[a] & self._masks[b])

    def depends(self, value: fx.Node, on: fx.Node) -> bool:
        """Return whether a value is computed from another one."""
        return self._masks[value] | self._masks[on] == self._masks[value]

    def count_of_one(self, a: fx.Node, b: fx.Node) -> int:
        """Return the number of ancestors of `a` that are not ancestors of `b`."""
        return (self._masks[a] & ~self._masks[b]).bit_count()

    def of_one(self, a: fx.Node, *others: fx.Node) -> set[fx.Node]:
        """Return the ancestors of `a` that are not ancestors of any of `others`."""
        mask = self._masks[a]
        for other in others:
            mask &= ~self._masks.get(other, 0)
        return {node for place, node in enumerate(self.nodes) if mask >> place & 1}


def compute(node: fx.Node, values: Values) -> Any:
    """Return the result of one operation on the values of its inputs."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    return node.target(*args, **kwargs)


def named_tensors(net: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, including non-persistent ones and every name of a shared tensor."""
    return dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))


def export_graph(net: nn.Module, input_size: tuple[int, int, int]) -> TracedProgram:
    """Trace a network in eval mode for images of `input_size` (C, H, W) and any batch size.

    Raises:
        ModelError: `torch.export` cannot export the network, or the program has an operation with graphs of its own.
    """
    tensor = next(net.parameters())
    image = torch.zeros(2, *input_size, dtype=tensor.dtype, device=tensor.device)
    try:
        with keeping_modes(net), torch.no_grad():
            program = torch.export.export(
                net.eval(), (image,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},), strict=False
            )
    except Exception as error:  # torch.export passes on any error of the network's own code
        if is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()
        raise ModelError(
            f"{type(net).__name__} cannot be traced for input {input_size}: {reason[0] if reason else error!r}; "
            "check the input size, or see docs/limits.md for what tracing follows"
        ) from error
    return _functional(program)


def _functional(program: torch.export.ExportedProgram) -> TracedProgram:
    """Turn an exported program into a `TracedProgram`: no nested graphs, no in-place operations, maskable norms."""
    signature, graph = program.graph_signature, program.graph
    _inline_regions(program.graph_module)
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    constants = signature.inputs_to_lifted_tensor_constants
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            node.target = _out_of_place(node.target)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    held = {**program.state_dict, **program.constants}
    removals = _open_norms(
        graph, placeholders[0], {node: names[node.name] for node in placeholders if node.name in names}
    )
    (output,) = [node for node in graph.nodes if node.op == "output"]
    return TracedProgram(
        nodes=tuple(graph.nodes),
        tensors={node: names[node.name] for node in placeholders if node.name in names}
        | {node: name for node, (name, _) in removals.items()},
        constants={node: program.constants[constants[node.name]] for node in placeholders if node.name in constants}
        | {node: none for node, (_, none) in removals.items()}
        | {node: held[names[node.name]] for node in placeholders if _is_index(held.get(names.get(node.name)))},
        image=next(node for node in placeholders if node.name not in names and node.name not in constants),
        logits=output.args[0][0],
    )


def _inline_regions(module: fx.GraphModule) -> None:
    """Inline, in place, the nested graphs in which export keeps code under `no_grad` or with autocast disabled.

    Raises:
        ModelError: Another operation has graphs of its own, such as a branch on data. Which of its graphs runs, and in what
            precision, cannot be known here.
    """
    for node in list(module.graph.nodes):
        region = next((arg for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"), None)
        inner = region and getattr(module, region.target)
        if not isinstance(inner, fx.GraphModule):
            continue
        if not (operation(node) == "wrap_with_set_grad_enabled" or _switches_autocast_off(node)):
            raise ModelError(
                f"{operation(node)} in {module_of(node) or 'the network itself'} has a graph of its own, which tracing does not "
                "follow; see docs/limits.md for what it follows"
            )
        _inline_regions(inner)
        given = node.args[node.args.index(region) + 1 :]
        placeholders = inner.graph.find_nodes(op="placeholder")
        with module.graph.inserting_before(node):
            outputs = module.graph.graph_copy(inner.graph, dict(zip(placeholders, given)))
        for user in list(node.users):
            user.replace_all_uses_with(outputs[user.args[1]])
            module.graph.erase_node(user)
        module.graph.erase_node(node)
        if not region.users:
            module.graph.erase_node(region)


def _switches_autocast_off(node: fx.Node) -> bool:
    """Return whether a node runs a nested graph with autocast disabled."""
    return operation(node) == "wrap_with_autocast" and node.args[2] is False  # device, type, enabled, ...


def _is_index(tensor: Tensor | None) -> bool:
    """Return whether a tensor holds integers or booleans."""
    return tensor is not None and not tensor.is_floating_point()


def _open_norms(graph: fx.Graph, first: fx.Node, tensors: Mapping[fx.Node, str]) -> dict[fx.Node, tuple[str, Tensor]]:
    """Replace every norm over channels, in place, by its version in `masked_norms`, with a placeholder for removed channels.

    Returns {placeholder: (name, value)} with the name "<weight>#gone" and an empty value. `first` is the node before which
    placeholders are inserted, `tensors` are the names of parameters and buffers.
    """
    found: dict[fx.Node, tuple[str, Tensor]] = {}
    by_name: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or (norm := _norm_over_channels(node)) is None:
            continue
        open_norm, weight, extra = norm
        name = f"{tensors.get(weight) or f'{module_of(node)}.{node.name}'}{REMOVED_SUFFIX}"
        if name not in by_name:
            none = torch.empty(0, dtype=torch.long, device=node.meta["val"].device)
            with graph.inserting_before(first):
                by_name[name] = graph.placeholder(name.replace(".", "_").replace("#", "_"))
            by_name[name].meta["val"] = none
            found[by_name[name]] = (name, none)
        node.target, node.kwargs = open_norm, {**node.kwargs, **extra, "gone": by_name[name]}
    return found


def _norm_over_channels(node: fx.Node) -> tuple[Callable, fx.Node | None, dict[str, int]] | None:
    """Return the masked version of a norm over channels, the tensor that gives it a name, and further arguments.

    Returns None for any other operation.
    """
    kind = operation(node)
    weight = argument_of(node, 2)
    if kind in ("layer_norm", "rms_norm") and len(node.args[1]) == 1:
        return getattr(norms, kind), weight, {}
    if kind == "group_norm" and node.args[1] == 1:
        return norms.group_norm, weight, {}
    source = standardised(node)
    if source is not None and (inputs := source.meta["val"].shape[1]) > 1:
        return norms.standardised_weight, source, {"inputs": inputs}
    return None


def standardised(node: object) -> fx.Node | None:
    """Return the weight [C_out, C_in, ...] that a node standardises row by row; None for any other node.

    Weight standardisation is exported as a batch_norm of the weight viewed as [1, C_out, -1].
    """
    if not isinstance(node, fx.Node) or operation(node) not in ("batch_norm", "standardised_weight"):
        return None
    rows, statistics, training = node.args[0], node.args[3:5], node.args[5]
    if operation(rows) not in ("view", "reshape") or statistics != (None, None) or not training:
        return None
    weight, shape = argument_of(rows, 0), rows.meta["val"].shape
    if weight.op != "placeholder" or list(shape[:2]) != [1, weight.meta["val"].shape[0]]:
        return None
    return weight


def weight_of(node: fx.Node) -> fx.Node | None:
    """Return the placeholder of a convolution's or linear layer's weight, also where the weight is standardised first.

    Returns None for other operations and for weights that are computed otherwise.
    """
    weight = node.args[1] if operation(node) in ("conv2d", "linear") else None
    if isinstance(weight, fx.Node) and operation(weight) in ("view", "reshape", "reshape_as"):
        source = standardised(weight.args[0])
        return source if source is not None and source.meta["val"].shape == weight.meta["val"].shape else None
    return weight if isinstance(weight, fx.Node) and weight.op == "placeholder" else None


def _out_of_place(op: torch._ops.OpOverload) -> torch._ops.OpOverload:
    """Return the out-of-place version of an operation, such as `aten.relu` for `aten.relu_`.

    Nodes may be run in another order, so no operation may overwrite its inputs.
    """
    name = op._schema.name.split("::")[1]
    if not name.endswith("_") or name.endswith("__"):
        return op
    return getattr(getattr(torch.ops.aten, name[:-1]), op._overloadname)


def argument_of(node: fx.Node, position: int, default: object = None) -> Any:
    """Return an operation's argument by position (a node, tensor, number or list), or the default if fewer are given."""
    return node.args[position] if len(node.args) > position else default


def operation(node: fx.Node) -> str:
    """Return the name of a node's operation, such as "conv2d"."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def module_of(node: fx.Node) -> str:
    """Return the name of the innermost module that runs this operation; "" for the network itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""


def modules_of(node: fx.Node) -> tuple[str, ...]:
    """Return the names of the modules that run this operation, outermost first."""
    return tuple(name for name, _ in (node.meta.get("nn_module_stack") or {}).values() if name)


def block_modules(graph: TracedProgram) -> frozenset[str]:
    """Return the names of all modules but containers (Sequential, ModuleList)."""
    stacks = [(node.meta.get("nn_module_stack") or {}).values() for node in graph.operations]
    kinds = {name: str(kind).rpartition(".")[2] for stack in stacks for name, kind in stack}
    return frozenset(name for name, kind in kinds.items() if name and kind not in ("Sequential", "ModuleList"))
