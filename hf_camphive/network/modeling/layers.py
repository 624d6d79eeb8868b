"""Layers of pruned networks that neither torch nor timm has.

Self-contained (torch only): a copy of this file is shipped inside saved folders as remote code.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Shortcut(nn.Module):
    """Replace a residual block whose branch was dropped: y = after(shortcut(x) + constant), [N, C, H, W].

    `shortcut` and `after` name children of `block`, which are applied in order and keep their names, so the names of their
    tensors do not change. `constant` [C] is initialised to zero.

    Raises:
        ValueError: `block` lacks a named child.
    """

    def __init__(self, block: nn.Module, shortcut: Sequence[str], after: Sequence[str], channels: int) -> None:
        super().__init__()
        children = dict(block.named_children())
        if unknown := [name for name in (*shortcut, *after) if name not in children]:
            raise ValueError(f"{type(block).__name__} has no children {unknown}; it has {list(children)}")
        self.shortcut_names, self.after_names = tuple(shortcut), tuple(after)
        for name in (*shortcut, *after):
            self.add_module(name, children[name])
        like = next(block.parameters(), torch.empty(0))
        self.constant = nn.Parameter(like.new_zeros(channels))
        self.training = block.training  # the children keep their own modes

    def forward(self, x: Tensor) -> Tensor:
        for name in self.shortcut_names:
            x = self.get_submodule(name)(x)
        x = x + self.constant.view(1, -1, 1, 1)
        for name in self.after_names:
            x = self.get_submodule(name)(x)
        return x


class ImplantedConv2d(nn.Conv2d):
    """A convolution that uses 1x1 kernels for some of its channels (HAP's neural implants, arXiv:2101.08940).

    y = [W * x_main + R * x_implanted, M * x] with x = [x_main, x_implanted]. The main channels have the weight W
    [C_main_out, C_main_in, kH, kW]; `reads` R [C_main_out, I, 1, 1] reads the I implanted inputs, and `makes` M
    [J, C_main_in + I, 1, 1] computes the J implanted outputs, which are the last ones. `reads` or `makes` is None if there are
    no such channels. The convolution must have no groups, and a padding that keeps the size up to the stride.
    """

    def __init__(self, conv: nn.Conv2d, reads: bool, makes: bool) -> None:
        super().__init__(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            bias=conv.bias is not None,
            device="meta",
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.reads = self._pointwise(conv.out_channels, bias=False) if reads else None
        self.makes = self._pointwise(1, bias=conv.bias is not None) if makes else None
        self.train(conv.training)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x if self.reads is None else x[:, : self.in_channels])
        if self.reads is not None:
            y = y + self.reads(x[:, self.in_channels :])
        return y if self.makes is None else torch.cat([y, self.makes(x)], dim=1)

    def _pointwise(self, outputs: int, bias: bool) -> nn.Conv2d:
        """Return a 1x1 convolution of one input channel with zero weights, to be resized later."""
        placement = {"device": self.weight.device, "dtype": self.weight.dtype}
        conv = nn.utils.skip_init(nn.Conv2d, 1, outputs, 1, self.stride, bias=bias, **placement)
        for parameter in conv.parameters():
            nn.init.zeros_(parameter).requires_grad_(self.weight.requires_grad)
        return conv
