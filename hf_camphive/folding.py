"""A network as it is deployed: every BatchNorm that follows a convolution folded into that convolution."""

import copy

import torch
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from .graph import Graph, export_graph, operation


def foldable(graph: Graph) -> dict[fx.Node, fx.Node]:
    """{batch norm: convolution} of every batch norm that reads a convolution which nothing else reads."""
    return {
        node: node.args[0]
        for node in graph.operations
        if operation(node) == "batch_norm"
        and isinstance(node.args[0], fx.Node)
        and operation(node.args[0]) == "conv2d"
        and len(node.args[0].users) == 1
    }


def fold_batchnorm(net: nn.Module, input_size: tuple[int, int, int]) -> nn.Module:
    """A copy of the network, in eval mode, with BatchNorm folded into the convolutions before it.

    W' = W gamma / sqrt(var + eps), b' = (b - mean) gamma / sqrt(var + eps) + beta. A convolution or norm that runs more than
    once stays as it is.
    """
    folded = copy.deepcopy(net).eval()
    graph = export_graph(folded, input_size)
    pairs = [
        tuple(graph.tensors[node.args[1]].rpartition(".")[0] for node in (conv, norm))
        for norm, conv in foldable(graph).items()
    ]
    convs, norms = zip(*pairs) if pairs else ((), ())
    for conv_name, norm_name in pairs:
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        if convs.count(conv_name) > 1 or norms.count(norm_name) > 1:
            continue
        statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        with torch.no_grad():
            conv.weight, conv.bias = fuse_conv_bn_weights(conv.weight, conv.bias, *statistics)
        folded.set_submodule(norm_name, _without_norm(norm))
    return folded


def _without_norm(norm: nn.Module) -> nn.Module:
    """What a norm layer does besides: timm's hold their activation."""
    rest = [layer for name, layer in norm.named_children() if not isinstance(layer, nn.Identity)]
    return nn.Sequential(*rest) if len(rest) > 1 else rest[0] if rest else nn.Identity()
