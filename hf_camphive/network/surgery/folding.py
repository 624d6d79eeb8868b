"""A network as it is deployed: BatchNorm, and what dropped blocks left, folded into the convolutions before them."""

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hf_camphive.network.graph.program import (
    TracedProgram,
    export_graph,
    module_of,
    modules_of,
    named_tensors,
    operation,
)
from hf_camphive.network.modeling.modeling_camphive import Shortcut


def fold(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A copy of the network, in eval mode, with the same outputs for images of `input_size` (C, H, W) by fewer operations.

    `fold_batchnorm`, then `fold_shortcuts`. For deployment and timing: it can no longer be trained as it was.
    """
    folded = fold_batchnorm(net, input_size)
    if any(isinstance(module, Shortcut) for module in folded.modules()):
        fold_shortcuts(folded, input_size)
    return folded


# BatchNorm


def foldable(graph: TracedProgram) -> dict[fx.Node, fx.Node]:
    """{batch norm: convolution} of every batch norm that can become part of the convolution whose output it alone reads.

    That takes running statistics, and a weight that is a tensor of the network, not worked out from one as in weight
    standardisation. Layers that run more than once, or whose tensors are read elsewhere too, stay as they are.
    """
    return {
        node: node.args[0]
        for node in graph.operations
        if operation(node) == "batch_norm"
        and not node.args[5]  # statistics of the batch
        and isinstance(node.args[0], fx.Node)
        and operation(node.args[0]) == "conv2d"
        and len(node.args[0].users) == 1
        and all(held in graph.tensors and len(held.users) == 1 for held in (node.args[0].args[1], node.args[3]))
    }


@torch.no_grad()
def fold_batchnorm(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A copy of the network, in eval mode, with BatchNorm folded into the convolutions before it.

    W' = W gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta; gamma is 1 and beta 0 where the norm has
    none. What is not `foldable`, or is no layer of its own, stays as it is.
    """
    folded = copy.deepcopy(net).eval()
    graph = export_graph(folded, input_size)
    tensors, runs = named_tensors(folded), Counter(map(module_of, graph.operations))
    for norm_node, conv_node in foldable(graph).items():
        conv, norm = (folded.get_submodule(module_of(node)) for node in (conv_node, norm_node))
        weight, mean = (tensors[graph.tensors[node]] for node in (conv_node.args[1], norm_node.args[3]))
        if not (isinstance(conv, nn.Conv2d) and conv.weight is weight):
            continue
        if not (isinstance(norm, _BatchNorm) and norm.running_mean is mean and runs[module_of(norm_node)] == 1):
            continue
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        for name in [name for name, module in folded.named_modules(remove_duplicate=False) if module is norm]:
            folded.set_submodule(name, _without_norm(norm))
    return folded


def _without_norm(norm: nn.Module) -> nn.Module:
    """What a norm layer does besides: timm's hold their activation."""
    rest = [layer for name, layer in norm.named_children() if not isinstance(layer, nn.Identity)]
    return nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()


# Dropped blocks


class ChannelwiseMaximum(nn.Module):
    """y = max(x, b) [B, C, H, W], b [C]: what ReLUs with constants between them come to."""

    def __init__(self, floor: Tensor) -> None:
        super().__init__()
        self.floor = nn.Parameter(floor.view(1, -1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.floor)


@dataclass(frozen=True)
class FoldTarget:
    """Where the constant of a dropped block goes: a convolution, and the ReLU that follows (None: none does).

    `gone` are the block's own operations that this saves: its add, and its ReLU.
    """

    conv: fx.Node
    relu: fx.Node | None
    gone: tuple[fx.Node, ...]


def shortcut_targets(
    graph: TracedProgram, adds: Mapping[str, tuple[fx.Node, fx.Node]], norms: Mapping[fx.Node, fx.Node]
) -> dict[str, FoldTarget]:
    """{module: host} of dropped blocks whose constant a convolution can take, given as {module: (add, its shortcut)}.

    The shortcut must be the block's very input, nothing else may read what the constant goes into, and only a ReLU may follow
    the block's add. `norms` are those that will be folded first (`foldable`); any other between keeps a constant out.
    """
    hosts, host_of = {}, {}
    for module, (add, value) in adds.items():
        gone = _left_of_block(module, add)
        inside = module in modules_of(value)
        if gone is None or inside or any(module not in modules_of(user) for user in value.users):
            continue
        found = host_of.get(value) or _host_before(value, norms)
        if found is None or (found[1] is None and len(gone) > 1):
            continue
        hosts[module] = FoldTarget(*found, gone)
        host_of[gone[-1]] = found
    return hosts


def _left_of_block(module: str, add: fx.Node) -> tuple[fx.Node, ...] | None:
    """The add of a dropped block and the ReLU after it; None where it does more."""
    after = [user for user in add.users if module in modules_of(user)]
    if not after:
        return (add,)
    relu = after[0]
    if len(add.users) > 1 or operation(relu) != "relu" or any(module in modules_of(user) for user in relu.users):
        return None
    return add, relu


def _host_before(value: fx.Node, norms: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node | None] | None:
    """The convolution that `value` = [relu](convolution [+ other]) comes from, and the ReLU."""
    relu = value if operation(value) == "relu" else None
    source = value.args[0] if relu else value
    if relu and len(source.users) > 1:
        return None
    for node in source.args[:2] if operation(source) == "add" else (source,):
        conv = norms.get(node, node)
        if isinstance(conv, fx.Node) and operation(conv) == "conv2d" and (node is source or len(node.users) == 1):
            return conv, relu
    return None


@torch.no_grad()
def fold_shortcuts(net: nn.Module, input_size: tuple[int, int, int]) -> None:
    """Fold the constants c of dropped blocks into the convolutions before them, in place, once BatchNorm is folded.

    relu(max(u, b) + c) = max(u + c, max(b + c, 0)): with u the convolution's output (and what is added to it) and b = 0 at
    first, any number of dropped blocks in a row come to a bias and one maximum. A `Shortcut` elsewhere stays as it is.
    """
    graph = export_graph(net, input_size)
    adds = {
        module: (node, node.args[0])
        for node in graph.operations
        if operation(node) == "add" and isinstance(net.get_submodule(module := module_of(node)), Shortcut)
    }
    runs = Counter(module_of(node) for node in graph.operations)
    floors: dict[str, Tensor] = {}
    for module, host in shortcut_targets(graph, adds, norms={}).items():
        conv_name, relu_name = (node and module_of(node) for node in (host.conv, host.relu))
        is_plain = isinstance(net.get_submodule(conv_name), nn.Conv2d) and runs[conv_name] == 1
        if not is_plain or (
            relu_name and not (isinstance(net.get_submodule(relu_name), nn.ReLU) and runs[relu_name] == 1)
        ):
            continue
        conv, constant = net.get_submodule(conv_name), net.get_submodule(module).constant
        conv.bias = nn.Parameter(constant.clone() if conv.bias is None else conv.bias + constant)
        if relu_name:
            floor = floors.get(relu_name, torch.zeros_like(constant)) + constant
            floors[relu_name] = floor.clamp_min(0) if len(host.gone) > 1 else floor
        net.set_submodule(module, nn.Identity())
    for name, floor in floors.items():
        if floor.any():
            net.set_submodule(name, ChannelwiseMaximum(floor))
