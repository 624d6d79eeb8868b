"""Restore the training or eval mode of every module of a network after using it in another mode."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(net: nn.Module) -> Iterator[None]:
    """Restore on exit the training or eval mode that each module had on entry, also after an error.

    `net.train(net.training)` is not enough: it would also put into training mode a BatchNorm that was frozen with `eval()`
    inside a network in training mode.
    """
    modes = {module: module.training for module in net.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
