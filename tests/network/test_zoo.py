"""A sample of the zoo (all of it: `make zoo`), and networks drawn at random from blocks of every kind."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.tiers import first_by_default
from support.toys import images, randomise, relative_error, seeded
from support.zoo import zoo
from timm.layers import LayerNorm2d, ScaledStdConv2d
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ConvNextConfig, ViTConfig

from hf_camphive.core.errors import ModelError
from hf_camphive.hub.loading import load_base
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.surgery.cutting import apply_plan, mask_state
from hf_camphive.network.surgery.verification import check_groups
from hf_camphive.runs.pruner import CampHiVePruner

SAMPLE = [  # small ones of families that differ: residuals, gates, splits, shuffles of paths, groups, other norms, attention
    *("resnet10t", "skresnet18", "resnest14d", "mobilenetv4_conv_small", "lcnet_050", "ghostnet_100", "regnety_004"),
    *("repvgg_a0", "convnextv2_atto", "starnet_s1", "mobilevitv2_050", "efficientvit_b0"),
]


@pytest.mark.parametrize("name", first_by_default(SAMPLE, 2))
def test_a_network_of_the_zoo_is_cut_trained_and_read_back(name):
    assert name in zoo.LIST.read_text().split("\n")
    row = zoo.prune_here(name)
    assert zoo.passed(row), row


class Gate(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = (
            nn.Conv2d(width, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.Conv2d(6, width, 1),
        )
        self.scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.conv2(self.norm(self.conv1(x)).relu())


class Doubled(nn.Module):
    """Concatenated with what a depthwise convolution makes of it, as in GhostNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cheap = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.cheap(x)], dim=1)


class Linked(nn.Module):
    """Halves, one gating the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        return a * b.sigmoid()


class Parts(nn.Module):
    """Unequal parts that go different ways."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = (3, width - 3)
        self.first = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(x, self.sizes, dim=1)
        return torch.cat([nn.functional.max_pool2d(b, 3, 1, 1), self.first(a)], dim=1)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Selective(nn.Module):
    """Two paths weighed by a softmax over paths, as in SKNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.choose = nn.Conv2d(width, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        paths = torch.stack([self.a(x), self.b(x)], dim=1)
        weights = self.choose(paths.sum(1).mean((2, 3), keepdim=True))
        weights = weights.view(x.shape[0], 2, weights.shape[1] // 2, 1, 1).softmax(dim=1)
        return (paths * weights).sum(1)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads, self.norm, self.qkv, self.proj = (
            3,
            nn.LayerNorm(width),
            nn.Linear(width, 36),
            nn.Linear(12, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        qkv = self.qkv(self.norm(tokens)).reshape(n, h * w, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).reshape(n, h * w, -1)
        return (tokens + self.proj(y)).transpose(1, 2).reshape(n, c, h, w)


class Wide(nn.Module):
    """An upsampled coarse map added to a fine one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(width, width, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.interpolate(self.coarse(x), scale_factor=2, mode="bilinear")


def block(kind: str, width: int) -> tuple[nn.Module, int]:
    """A block of a kind for so many input channels, and its output channels."""
    return {
        "conv": lambda: (
            nn.Sequential(nn.Conv2d(width, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.SiLU()),
            8,
        ),
        "grouped": lambda: (nn.Conv2d(width, 12, 3, padding=1, groups=2 - width % 2), 12),
        "depthwise": lambda: (nn.Conv2d(width, width, 3, padding=1, groups=width), width),
        "group norm": lambda: (nn.Sequential(nn.Conv2d(width, 8, 1), nn.GroupNorm(4, 8), nn.GELU()), 8),
        "one group": lambda: (nn.GroupNorm(1, width), width),
        "layer norm": lambda: (LayerNorm2d(width), width),
        "standardised": lambda: (ScaledStdConv2d(width, 8, 3), 8),
        "gate": lambda: (Gate(width), width),
        "residual": lambda: (Residual(width), width),
        "doubled": lambda: (Doubled(width), 2 * width),
        "linked": lambda: (Linked(width), width),
        "parts": lambda: (Parts(width), width + 2),
        "shuffle": lambda: (Shuffle() if width % 2 == 0 else nn.Identity(), width),
        "selective": lambda: (Selective(width), width),
        "attention": lambda: (Attention(width), width),
        "wide": lambda: (Wide(width), width),
    }[kind]()


KINDS = (
    *"conv grouped depthwise residual doubled linked parts shuffle selective attention wide gate standardised".split(),
    *("group norm", "one group", "layer norm"),
)


def assemble(kinds: list[str]) -> nn.Module:
    """Stem, blocks, head."""
    with seeded():
        layers, width = [nn.Conv2d(3, 8, 3, padding=1)], 8
        for kind in kinds:
            layer, width = block(kind, width)
            layers.append(layer)
        layers += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 5)]
        return nn.Sequential(*layers)


def cut_at_random(net: nn.Module) -> float:
    """Half of every group goes; the relative difference to the masked network."""
    trace = check_groups(net, trace_network(net, (3, 8, 8)), torch.Generator().manual_seed(0))
    assert {g.frozen for g in trace.groups} <= {None, "output of the network"}, trace.groups
    plan = zoo.uniform_plan(trace)
    assert plan.cuts
    small, x = apply_plan(net, plan, trace), images(2)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in net.parameters())
    with torch.no_grad():
        return relative_error(small(x), trace.graph.run(mask_state(named_tensors(net), plan), x)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_block_is_cut(kind):
    assert cut_at_random(randomise(assemble([kind, "conv"]))) < 1e-9


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=2, max_size=5))
def test_random_networks_compute_what_their_masked_twins_do(kinds):
    assert cut_at_random(randomise(assemble(kinds))) < 1e-9


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16, patch_size=8
        ),
        ConvNextConfig(hidden_sizes=[4, 4, 4, 4], depths=[1, 1, 1, 1], image_size=32),
    ],
    ids=lambda config: config.model_type,
)
def test_networks_of_transformers_itself_are_refused_with_the_reason(config, tmp_path):
    net = AutoModelForImageClassification.from_config(config)
    with pytest.raises(ModelError, match=r"ForImageClassification is one of transformers' own models.* from timm"):
        CampHiVePruner(net)
    net.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"type '{config.model_type}', not a timm image classifier"):
        load_base(str(tmp_path))


def test_numbers_that_modules_hold_stay_true_and_pruning_goes_on():
    net = randomise(assemble(["attention", "group norm", "layer norm", "conv"]))
    for heads in (1, 1):
        trace = check_groups(net, trace_network(net, (3, 8, 8)), torch.Generator().manual_seed(0))
        net = apply_plan(net, zoo.uniform_plan(trace), trace)
        assert (
            net[1].num_heads == heads
            and net[1].qkv.out_features == 12 * heads
            and net[1].proj.in_features == 4 * heads
        )
        assert net[1].norm.normalized_shape == (net[0].out_channels,) == (net[1].qkv.in_features,)
        assert net[2][1].num_channels == net[2][0].out_channels == 2 * net[2][1].num_groups
        assert net[3].normalized_shape == (net[3].weight.shape[0],)
    x = images(2)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    exported = torch.export.export(net, (x,)).module()
    assert relative_error(exported(x), net(x)) < 1e-9


def test_tied_weights_stay_tied():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(512, 5)
    )
    net[3].weight = net[1].weight
    net = net.double().eval()
    trace = check_groups(net, trace_network(net, (3, 8, 8)), torch.Generator().manual_seed(0))
    small = apply_plan(net, zoo.uniform_plan(trace), trace)
    assert small[3].weight is small[1].weight and small[1].weight.shape == (4, 4, 1, 1)


@pytest.mark.slow
def test_a_pruned_network_compiles():
    net = randomise(assemble(["attention", "selective", "group norm"]))
    trace = check_groups(net, trace_network(net, (3, 8, 8)), torch.Generator().manual_seed(0))
    small, x = apply_plan(net, zoo.uniform_plan(trace), trace), images(2)
    assert relative_error(torch.compile(small)(x), small(x)) < 1e-9
