"""Small networks whose channel groups can be drawn by hand, and states that hide nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A residual block: act2(x + bn2(conv2(act1(bn1(conv1(x)))))), with a 1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, inner: int, outputs: int, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, inner, 3, padding=1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(inner), act()
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1, bias=False)
        self.bn2, self.act2 = nn.BatchNorm2d(outputs), act()
        same = inputs == outputs
        self.downsample = None if same else nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(y + (x if self.downsample is None else self.downsample(x)))


class ToyResNet(nn.Module):
    """Stem, two residual blocks, linear head: groups stem (6), two interiors (5 and 7), stage (8), classes (3).

    SiLU by default: a ReLU leaves some random channels dead.
    """

    def __init__(self, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        with seeded():
            self.stem, self.bn, self.act = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), act()
            self.block1, self.block2 = Block(6, 5, 6, act), Block(6, 7, 8, act)
            self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.block1(self.act(self.bn(self.stem(x)))))
        return self.head(self.flatten(self.pool(x)))


class Chain(nn.Module):
    """Two convolutions with a flatten before the head, so that each channel of the second owns 4 * 4 columns."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        with seeded():
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            self.conv2 = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=groups)
            self.head = nn.Linear(8 * 4 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.conv1(x).relu()).relu().flatten(1))


class Toy(nn.Module):
    """A network made of named layers and a function that runs them on an image; ends in means over positions."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x).mean((2, 3))


@contextmanager
def seeded() -> Iterator[None]:
    """Weights drawn inside are the same every time, and nothing outside notices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random norms and running statistics, so that no channel is silent; in eval mode and float64."""
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.weight, 0.5),
                (module.running_var, 0.5),
                (module.bias, -0.3),
                (module.running_mean, -0.3),
            ):
                if tensor is not None:
                    tensor.data.copy_(low + torch.rand(tensor.shape, generator=generator))
    return net.eval().double()


def images(count: int, size: int = 8, seed: int = 0) -> Tensor:
    """Random images [count, 3, size, size] in float64."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())
