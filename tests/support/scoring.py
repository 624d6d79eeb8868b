"""What a criterion is given, for toy networks."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.pruning.scoring.context import ScoringContext
from hf_camphive.training.data.calibration import Calibration
from support.toys import Block, ToyResNet, images, randomise, seeded


def context(net=None, count: int = 12, batches: tuple[int, ...] = (5, 7), size: int = 8, **config) -> ScoringContext:
    torch.manual_seed(0)
    net = randomise(net or ToyResNet())
    trace = trace_network(net, (3, size, size))
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    analysis = NetworkAnalysis(trace, state, frozenset(name for name, _ in net.named_parameters()))
    x, labels = images(count, size), torch.arange(count) % 3
    numbers = torch.arange(count)
    calibration = Calibration(x.split(batches), labels.split(batches), numbers.split(batches), count)
    return ScoringContext(analysis, calibration, CampHiVeConfig(calibration_size=16, curvature_images=count, **config))


def with_state(subject: ScoringContext, state: dict[str, Tensor]) -> ScoringContext:
    """The same subject with these weights."""
    return replace(subject, analysis=replace(subject.analysis, state=state))


class SmallResNet(nn.Module):
    """Stem, one residual block, head: few enough weights for dense matrices in weight space."""

    def __init__(self, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        with seeded():
            self.stem, self.bn, self.act = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2), act()
            self.block1 = Block(2, 5, 2, act)
            self.pool, self.flatten, self.head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.pool(self.block1(self.act(self.bn(self.stem(x)))))))


WEIGHT_SPACE = ("hive-paper", "hap")  # products with all weights: laws are tried on a small network


def subject_for(name: str, act: type[nn.Module] = nn.SiLU) -> ScoringContext:
    if name in WEIGHT_SPACE:
        return context(SmallResNet(act), 3, (2, 1), 3)
    return context(ToyResNet(act))
