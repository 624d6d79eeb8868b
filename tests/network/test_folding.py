"""What is folded computes what the network does, and what cannot be folded stays: norms and convolutions of every make."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from support.plans import plan_with
from support.toys import ToyResNet, images, relative_error, seeded
from support.zoo import zoo
from timm.layers import BatchNormAct2d, GroupNormAct, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hf_camphive.network.graph.program import export_graph, named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.network.surgery.folding import fold, foldable
from hf_camphive.network.surgery.verification import check_groups
from hf_camphive.pruning.merging.reconstruction import reconstruct
from hf_camphive.pruning.merging.task import MergeTask


class Scaled(nn.BatchNorm2d):
    """A norm that does more than a norm does."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class ByHand(nn.Module):
    """A norm that is not a layer: the network's own code calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3)
        self.register_buffer("running_mean", torch.rand(6))
        self.register_buffer("running_var", 1 + torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.running_mean, self.running_var).relu()


class OwnConvolution(nn.Module):
    """A convolution that is not a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.norm = nn.Parameter(torch.rand(6, 3, 1, 1)), None, nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.conv2d(x, self.weight)).relu()


class TwoNames(nn.Module):
    """A norm that is found under two names, and runs once."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.layers = nn.Sequential(nn.Conv2d(3, 6, 3), self.norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).relu()


class ReadElsewhere(nn.Module):
    """The weight is read a second time, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) * self.conv.weight.square().mean()


def pair(conv: Callable[..., nn.Module] = nn.Conv2d, **norm: bool) -> nn.Module:
    return nn.Sequential(conv(3, 6, 3), nn.BatchNorm2d(6, **norm), nn.ReLU())


def tied() -> nn.Module:
    """Two convolutions that share their weight, each with a norm of its own."""
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    return nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second, nn.BatchNorm2d(3))


def spread(net: nn.Module) -> nn.Module:
    """Random tensors everywhere (`randomise` needs norms with weights), eval mode, float64."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in named_tensors(net).items():
        if tensor.is_floating_point():
            drawn = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(0.5 + drawn if "var" in name or "norm" in name else drawn - 0.4)
    return net.eval().double()


def norms_of(net: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


TOYS = {  # the network, and the norms that are left once it is folded
    "no weight and bias": (lambda: pair(affine=False), 0),
    "no weight and bias, activation within": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), BatchNormAct2d(6, affine=False, act_layer=nn.SiLU)),
        0,
    ),
    "no statistics": (lambda: pair(track_running_stats=False), 1),
    "neither": (lambda: pair(affine=False, track_running_stats=False), 1),
    "standardised weight": (lambda: pair(StdConv2d), 1),
    "standardised and scaled weight": (lambda: pair(ScaledStdConv2d), 1),
    "normalised weight": (lambda: pair(lambda *sizes: parametrizations.weight_norm(nn.Conv2d(*sizes))), 1),
    "norm called by hand": (ByHand, 0),
    "convolution called by hand": (OwnConvolution, 1),
    "a norm that does more": (lambda: nn.Sequential(nn.Conv2d(3, 6, 3), Scaled(6)), 1),
    "one norm of two names": (TwoNames, 0),
    "tied weights": (tied, 2),
    "weight read elsewhere": (ReadElsewhere, 1),
}


@pytest.mark.parametrize("name", TOYS)
def test_what_cannot_be_folded_stays_and_all_else_is_folded(name):
    make, left = TOYS[name]
    with seeded():
        net = spread(make())
    before = copy.deepcopy(net)
    folded = fold(net, (3, 8, 8))
    with torch.no_grad():
        assert relative_error(folded(images(2)), net(images(2))) < 1e-9
    assert norms_of(folded) == left
    assert norms_of(net) == norms_of(before) and all(
        map(torch.equal, net.state_dict().values(), before.state_dict().values())
    )


@pytest.mark.parametrize(
    "name", sorted(TOYS.keys() - {"norm called by hand", "convolution called by hand", "a norm that does more"})
)
def test_the_prediction_of_latency_folds_what_is_folded(name):
    """`latency` counts on `foldable`, which sees no modules and so takes a call by hand for a layer."""
    make, left = TOYS[name]
    net = spread(make())
    assert len(foldable(export_graph(net, (3, 8, 8)))) == norms_of(net) - left


@pytest.mark.parametrize(
    "norm", [{"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}]
)
def test_a_network_with_such_a_norm_is_pruned_and_reconstructed_before_it_is_folded(norm):
    net = ToyResNet()
    net.block1.bn2 = nn.BatchNorm2d(6, **norm)  # between the layer that is fitted and the sum that it is fitted to
    net = net.double().eval()
    trace = check_groups(net, trace_network(net, (3, 8, 8)), torch.Generator().manual_seed(0))
    plan = plan_with(trace, {"block1.conv1": (0, 2, 3), "block2.conv1": (1, 2, 3, 4)})
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    small = apply_plan(net, plan, trace, reconstruct(MergeTask(state, plan, trace, [images(6)])))
    with torch.no_grad():
        assert relative_error(fold(small, (3, 8, 8))(images(2)), small(images(2))) < 1e-9


def small_resnetv2(**options: object) -> nn.Module:
    widths = {"layers": (1, 1, 1), "channels": (16, 16, 32), "stem_chs": 8, "num_classes": 5}
    return timm.models.resnetv2.ResNetV2(**widths, **options)


SMALL = {
    "BiT": lambda: small_resnetv2(
        conv_layer=StdConv2d, norm_layer=partial(GroupNormAct, num_groups=8), stem_type="fixed"
    ),
    "weight-standardised with BatchNorm": lambda: small_resnetv2(
        conv_layer=StdConv2d, norm_layer=BatchNormAct2d, preact=False
    ),
    "norm-free": lambda: timm.models.nfnet.NormFreeNet(
        timm.models.nfnet.NfCfg(depths=(1, 1), channels=(16, 16), stem_chs=8), num_classes=5
    ),
    "ResNet-D without weights of norms": lambda: timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock,
        (1, 1, 1, 1),
        channels=(8, 8, 16, 16),
        num_classes=5,
        stem_type="deep",
        stem_width=8,
        avg_down=True,
        zero_init_last=False,
        norm_layer=partial(nn.BatchNorm2d, affine=False),
    ),
}


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_of_timm_are_folded(name):
    with seeded():
        net = spread(SMALL[name]())
    folded = fold(net, (3, 32, 32))
    with torch.no_grad():
        assert relative_error(folded(images(2, 32)), net(images(2, 32))) < 1e-9
    assert norms_of(folded) == (0 if "ResNet-D" in name else norms_of(net))


BESIDE_THE_ZOO = ["resnetv2_50x1_bit", "resnetv2_18d", "resnet14t", "nf_ecaresnet26", "dm_nfnet_f0"]


@pytest.mark.zoo
@pytest.mark.parametrize("name", [*zoo.LIST.read_text().split("\n")[1:-1], *BESIDE_THE_ZOO])
def test_networks_of_timm_are_folded(name):
    net, size = zoo.network(name)
    image = torch.randn(2, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(fold(net, size)(image), net(image)) < 1e-9
