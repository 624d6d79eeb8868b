"""Training and eval mode of the modules of a network, kept while it is used in another one."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def keeping_modes(net: nn.Module) -> Iterator[None]:
    """Put every module back into training or eval mode as it was on entry, whatever happens inside.

    `net.train(net.training)` would not: a BatchNorm that was frozen by `eval()` within a network that trains would train.
    """
    modes = {module: module.training for module in net.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
