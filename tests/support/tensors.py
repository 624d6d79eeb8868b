"""Tensors whose memory is aligned as torch aligns its own."""

from torch import nn


def aligned(net: nn.Module) -> nn.Module:
    """Move tensors off the file mapping: a linear layer rounds differently where its weight is not 64-byte aligned."""
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data = tensor.data.clone()
    return net.eval()
