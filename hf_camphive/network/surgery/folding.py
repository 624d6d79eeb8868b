"""Fold a network for deployment: BatchNorm and the constants of dropped blocks, into the convolutions before them."""

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
from hf_camphive.network.modeling.layers import Shortcut


def fold(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """Return a copy of the network, in eval mode, that computes the same outputs with fewer operations.

    Applies `fold_batchnorm`, then `fold_shortcuts`, for images of `input_size` (C, H, W). The copy is meant for deployment and
    timing; it can no longer be trained like the original.

    Raises:
        ModelError: The network cannot be exported (`export_graph`).
    """
    folded = fold_batchnorm(net, input_size)
    if any(isinstance(module, Shortcut) for module in folded.modules()):
        fold_shortcuts(folded, input_size)
    return folded


# BatchNorm


def foldable(graph: TracedProgram) -> dict[fx.Node, fx.Node]:
    """Return {batch norm: convolution} for each batch norm that can be folded into the convolution before it.

    The batch norm must use running statistics and be the only reader of the convolution's output. The convolution's weight
    must be a tensor of the network itself, which excludes weight standardisation. Layers that run more than once, or whose
    tensors are read elsewhere too, are not folded.
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
    """Return a copy of the network, in eval mode, with BatchNorm folded into the convolutions before it.

    W' = W gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta; gamma is 1 and beta 0 if the norm has no
    affine parameters. A norm is left unchanged if it is not `foldable`, or if it or its convolution is not a module.

    Raises:
        ModelError: The network cannot be exported (`export_graph`).
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
    """Return the layers that a norm holds as children (timm's norms hold their activation), or the identity."""
    rest = [layer for name, layer in norm.named_children() if not isinstance(layer, nn.Identity)]
    return nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()


# Dropped blocks


class ChannelwiseMaximum(nn.Module):
    """Compute y = max(x, b) for x [B, C, H, W] and b [C]; replaces several ReLUs with constants added between them."""

    def __init__(self, floor: Tensor) -> None:
        super().__init__()
        self.floor = nn.Parameter(floor.view(1, -1, 1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(x, self.floor)


@dataclass(frozen=True)
class FoldTarget:
    """The convolution into which the constant of a dropped block can be folded, and the ReLU after it, if any.

    `gone` are the operations of the block that folding removes: its add, and its ReLU if it has one.
    """

    conv: fx.Node
    relu: fx.Node | None
    gone: tuple[fx.Node, ...]


def shortcut_targets(
    graph: TracedProgram, adds: Mapping[str, tuple[fx.Node, fx.Node]], norms: Mapping[fx.Node, fx.Node]
) -> dict[str, FoldTarget]:
    """Return {module: fold target} for each dropped block whose constant can be folded into an earlier convolution.

    `adds` is {module: (the block's add, its shortcut value)}. The shortcut must be the block's input itself, no operation
    outside of the block may read that input, and only a ReLU may follow the block's add. `norms` are the batch norms that will
    be folded first (`foldable`); any other operation between the convolution and the block prevents folding.
    """
    targets: dict[str, FoldTarget] = {}
    origins: dict[fx.Node, tuple[fx.Node, fx.Node | None]] = {}  # output of a folded block -> its convolution and ReLU
    for module, (add, value) in adds.items():
        gone = _left_of_block(module, add)
        inside = module in modules_of(value)
        if gone is None or inside or any(module not in modules_of(user) for user in value.users):
            continue
        found = origins.get(value) or _origin_of(value, norms)
        if found is None or (found[1] is None and len(gone) > 1):
            continue
        conv, relu = found
        targets[module] = FoldTarget(conv, relu, gone)
        origins[gone[-1]] = found
    return targets


def _left_of_block(module: str, add: fx.Node) -> tuple[fx.Node, ...] | None:
    """Return the add of a dropped block and the ReLU after it, if any; None if the block has other operations."""
    after = [user for user in add.users if module in modules_of(user)]
    if not after:
        return (add,)
    relu = after[0]
    if len(add.users) > 1 or operation(relu) != "relu" or any(module in modules_of(user) for user in relu.users):
        return None
    return add, relu


def _origin_of(value: fx.Node, norms: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node | None] | None:
    """Return the convolution and the ReLU, if any, of a value relu(convolution [+ other]) or convolution [+ other]."""
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
    """Fold the constants c of dropped blocks into the convolutions before them, in place, after BatchNorm was folded.

    relu(max(u, b) + c) = max(u + c, max(b + c, 0)), where u is the convolution's output plus any value added to it, and b = 0
    at first. Any number of consecutive dropped blocks therefore reduces to a bias and one maximum. A `Shortcut` whose
    constant cannot be folded is left unchanged.

    Raises:
        ModelError: The network cannot be exported (`export_graph`).
    """
    graph = export_graph(net, input_size)
    adds = {
        module: (node, node.args[0])
        for node in graph.operations
        if operation(node) == "add" and isinstance(net.get_submodule(module := module_of(node)), Shortcut)
    }
    runs = Counter(module_of(node) for node in graph.operations)
    floors: dict[str, Tensor] = {}
    for module, target in shortcut_targets(graph, adds, norms={}).items():
        conv_name, relu_name = (node and module_of(node) for node in (target.conv, target.relu))
        is_plain = isinstance(net.get_submodule(conv_name), nn.Conv2d) and runs[conv_name] == 1
        if not is_plain or (
            relu_name and not (isinstance(net.get_submodule(relu_name), nn.ReLU) and runs[relu_name] == 1)
        ):
            continue
        conv, constant = net.get_submodule(conv_name), net.get_submodule(module).constant
        conv.bias = nn.Parameter(constant.clone() if conv.bias is None else conv.bias + constant)
        if relu_name:
            floor = floors.get(relu_name, torch.zeros_like(constant)) + constant
            floors[relu_name] = floor.clamp_min(0) if len(target.gone) > 1 else floor
        net.set_submodule(module, nn.Identity())
    for name, floor in floors.items():
        if floor.any():
            net.set_submodule(name, ChannelwiseMaximum(floor))
