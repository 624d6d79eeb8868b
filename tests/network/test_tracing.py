"""Groups of networks that are drawn by hand, and what tracing must refuse to guess."""

from collections.abc import Callable

import pytest
import timm
import torch
from support.toys import Block, Chain, Toy, ToyResNet, images, randomise
from torch import Tensor, nn

from hf_camphive.core.errors import CampHiVeError, ModelError
from hf_camphive.network.graph.blocks import affine_path, droppable_branches, exterior_groups, residual_adds
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.surgery.verification import check_groups


def groups_of(net: nn.Module, size: int = 8) -> dict[str, list[tuple[str, int, str]]]:
    trace = trace_network(net.eval(), (3, size, size))
    return {group.name: [(s.tensor, s.axis, s.role) for s in group.slots] for group in trace.groups}


def test_groups_of_a_residual_network_are_those_drawn_by_hand():
    trace = trace_network(ToyResNet().eval(), (3, 8, 8))
    assert {g.name: g.size for g in trace.groups} == {
        "stem": 6,
        "block1.conv1": 5,
        "block2.conv1": 7,
        "block2.conv2": 8,
        "head": 3,
    }
    slots = {g.name: {(s.tensor, s.axis, s.role) for s in g.slots} for g in trace.groups}
    norms = lambda name: {(f"{name}.{t}", 0, "affine") for t in ("weight", "bias", "running_mean", "running_var")}  # noqa: E731
    assert slots["stem"] == {
        ("stem.weight", 0, "producer"),
        ("block1.conv2.weight", 0, "producer"),
        ("block1.conv1.weight", 1, "consumer"),
        ("block2.conv1.weight", 1, "consumer"),
        ("block2.downsample.0.weight", 1, "consumer"),
        *norms("bn"),
        *norms("block1.bn2"),
    }
    assert slots["block1.conv1"] == {
        ("block1.conv1.weight", 0, "producer"),
        ("block1.conv2.weight", 1, "consumer"),
        *norms("block1.bn1"),
    }
    assert [g.name for g in trace.groups if g.frozen] == ["head"]
    assert exterior_groups(trace) == {"stem", "block2.conv2"}
    assert exterior_groups(trace_network(Chain().eval(), (3, 8, 8))) == frozenset()


def test_every_axis_of_every_weight_is_covered_exactly_once_but_for_the_image():
    net = timm.create_model("resnet18").eval()
    trace = trace_network(net, (3, 64, 64))
    seen: dict[tuple[str, int], list[int]] = {}
    for group in trace.groups:
        for slot in group.slots:
            seen.setdefault((slot.tensor, slot.axis), []).extend(slot.index)
    for name, parameter in net.named_parameters():
        for axis in range(min(parameter.dim(), 2)):
            expected = [] if (name, axis) == ("conv1.weight", 1) else list(range(parameter.shape[axis]))
            assert sorted(seen.get((name, axis), [])) == expected, (name, axis)


def test_macs_of_the_weights_are_torchs_own_count():
    net = timm.create_model("mobilenetv2_100").eval()
    trace = trace_network(net, (3, 224, 224))
    sizes = {name: p.numel() for name, p in net.named_parameters()}
    from hf_camphive.network.footprint import count_macs

    assert sum(count * sizes[name] for name, count in trace.positions.items()) == count_macs(net, (3, 224, 224))


def test_flatten_gives_each_channel_its_columns():
    trace = trace_network(Chain().eval(), (3, 8, 8))
    group = next(g for g in trace.groups if g.name == "conv2")
    head = next(s for s in group.slots if s.tensor == "head.weight")
    assert head.positions([0, 2], group.size) == [*range(16), *range(32, 48)]


def test_grouped_convolution_ties_equal_offsets():
    trace = trace_network(Chain(groups=2).eval(), (3, 8, 8))
    sizes = {g.name: g.size for g in trace.groups}
    assert sizes["conv1"] == 4 and sizes["conv2"] == 4
    group = next(g for g in trace.groups if g.name == "conv1")
    assert next(s for s in group.slots if s.tensor == "conv1.weight").positions([1], 4) == [1, 5]


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.head = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x), self.b(x)], dim=1)).mean((2, 3))


def test_concatenation_keeps_offsets():
    trace = trace_network(Concatenated().eval(), (3, 8, 8))
    index = {
        g.name: next(s.index for s in g.slots if s.tensor == "head.weight" and s.axis == 1)
        for g in trace.groups
        if g.name in "ab"
    }
    assert index == {"a": tuple(range(4)), "b": tuple(range(4, 10))}


class Shuffled(Concatenated):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.a(x), self.b(x)], dim=1)
        n, c, h, w = y.shape
        return self.head(y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)).mean((2, 3))


def test_channel_shuffle_keeps_both_halves_equal():
    """[a0 a1 a2 a3 b0 | b1 .. b5] becomes a0 b1 a1 b2 a2 b3 a3 b4 b0 b5: offsets go together."""
    groups = {g.name: g for g in trace_network(Shuffled().eval(), (3, 8, 8)).groups if not g.frozen}
    found = {name: {(s.tensor, s.axis): s.index for s in group.slots} for name, group in groups.items()}
    assert found["a"]["head.weight", 1] == (0, 1, 2, 3, 4, 5, 6, 7)
    assert found["a"]["a.weight", 0] == (0, 1, 2, 3) and found["a"]["b.weight", 0] == (1, 2, 3, 4)
    assert found["b"]["head.weight", 1] == (8, 9) and found["b"]["b.weight", 0] == (0, 5)


class Gated(nn.Module):
    """Squeeze and excitation: the gate's output is coupled to what it multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
            nn.Conv2d(8, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        gate = self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(x * gate).mean((2, 3))


def test_gate_is_coupled_to_what_it_multiplies():
    groups = groups_of(Gated())
    assert ("up.weight", 0, "producer") in groups["conv"] and ("down.weight", 1, "consumer") in groups["conv"]
    assert ("up.weight", 1, "consumer") in groups["down"]


class Sorted(Concatenated):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.head(torch.cat([torch.sort(y, dim=1).values, self.b(x)], dim=1)).mean((2, 3))


def test_an_unknown_operation_freezes_what_it_touches_and_is_named():
    trace = trace_network(Sorted().eval(), (3, 8, 8))
    frozen = {g.name: g.frozen for g in trace.groups}
    assert "sort" in frozen["a"] and "not understood" in frozen["a"]
    assert frozen["b"] is None


class Averaged(Concatenated):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(x) + self.a(x).mean(1, keepdim=True), self.b(x)], dim=1)).mean((2, 3))


def test_mixing_channels_without_weights_freezes_them():
    frozen = {g.name: g.frozen for g in trace_network(Averaged().eval(), (3, 8, 8)).groups}
    assert "averages over channels" in frozen["a"] and frozen["b"] is None


def test_untraceable_network_is_refused_with_its_reason():
    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("I do not feel like it")

    with pytest.raises(ModelError, match=r"Moody cannot be traced .*I do not feel like it"):
        trace_network(Moody(), (3, 8, 8))


def test_residual_branches_and_the_layers_that_close_them():
    trace = trace_network(ToyResNet().eval(), (3, 8, 8))
    found = residual_adds(trace.graph)
    assert [trace.graph.tensors[affine_path(j)[0].args[1]] for j in found] == [
        "block1.conv2.weight",
        "block2.conv2.weight",
    ]
    branches = {b.module: b for b in droppable_branches(trace)}
    assert branches["block1"].shortcut == () and branches["block1"].after == ("act2",)
    assert branches["block2"].shortcut == ("downsample",) and branches["block2"].gates == ("block2.conv1",)


class Padded(Block):
    """After the emptied interior a padded 3x3 sees a border: what is left is no constant."""

    def __init__(self) -> None:
        super().__init__(6, 5, 6)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv3(self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x))))))
        return self.act2(y + x)


def test_a_branch_that_leaves_no_constant_cannot_be_dropped():
    net = ToyResNet()
    net.block1 = Padded()
    assert [b.module for b in droppable_branches(trace_network(net.eval(), (3, 8, 8)))] == ["block2"]


def test_groups_pass_their_experiment_and_a_wrong_one_is_frozen():
    net = randomise(ToyResNet())
    trace = trace_network(net, (3, 8, 8))
    checked = check_groups(net, trace, torch.Generator().manual_seed(0))
    assert checked.groups == trace.groups
    from dataclasses import replace

    wrong = tuple(
        replace(g, slots=tuple(s for s in g.slots if s.tensor != "block2.downsample.0.weight"))
        if g.name == "stem"
        else g
        for g in trace.groups
    )
    checked = check_groups(net, replace(trace, groups=wrong), torch.Generator().manual_seed(0))
    assert [g.name for g in checked.groups if g.frozen and "moved the output" in g.frozen] == ["stem"]


def drawn(net: nn.Module) -> dict[str, tuple[int, set[tuple[str, int, tuple[int, ...]]]]]:
    """Size and (tensor, axis, positions) of each group that is free."""
    trace = trace_network(net.eval(), (3, 8, 8))
    return {g.name: (g.size, {(s.tensor, s.axis, s.index) for s in g.slots}) for g in trace.groups if not g.frozen}


def conv(inputs: int, outputs: int, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False, **options)


def test_unequal_parts_of_a_split_are_groups_of_their_own():
    def run(net, x):
        a, b = net.stem(x).split([2, 5], dim=1)
        return net.head(torch.cat([net.a(a), b], dim=1))

    found = drawn(Toy(run, stem=conv(3, 7), a=conv(2, 4), head=conv(9, 2)))
    assert found == {
        "stem": (2, {("stem.weight", 0, (0, 1)), ("a.weight", 1, (0, 1))}),
        "stem#2": (5, {("stem.weight", 0, (2, 3, 4, 5, 6)), ("head.weight", 1, (4, 5, 6, 7, 8))}),
        "a": (4, {("a.weight", 0, (0, 1, 2, 3)), ("head.weight", 1, (0, 1, 2, 3))}),
    }


def test_equal_parts_of_a_split_stay_equal():
    def run(net, x):
        a, b = net.stem(x).chunk(2, dim=1)
        return net.head(torch.cat([net.a(a), net.b(b)], dim=1))

    found = drawn(Toy(run, stem=conv(3, 6), a=conv(3, 2), b=conv(3, 2), head=conv(4, 2)))
    assert found["stem"] == (
        3,
        {("stem.weight", 0, (0, 3, 1, 4, 2, 5)), ("a.weight", 1, (0, 1, 2)), ("b.weight", 1, (0, 1, 2))},
    )


def test_a_module_called_twice_couples_what_goes_in_and_what_comes_out():
    def run(net, x):
        return net.head(net.twice(net.twice(net.stem(x)).relu()))

    every = (0, 1, 2, 3)
    assert drawn(Toy(run, stem=conv(3, 4), twice=conv(4, 4), head=conv(4, 2))) == {
        "stem": (
            4,
            {
                ("stem.weight", 0, every),
                ("twice.weight", 0, every),
                ("twice.weight", 1, every),
                ("head.weight", 1, every),
            },
        )
    }


def test_a_module_under_two_names_is_one():
    shared, every = conv(3, 4), (0, 1, 2, 3)
    found = drawn(Toy(lambda net, x: net.head(net.a(x).relu() * net.b(x)), a=shared, b=shared, head=conv(4, 2)))
    (group,) = found.values()
    assert group == (4, {("b.weight", 0, every), ("head.weight", 1, every)})  # the exporter calls it by its last name


def test_tied_weights_tie_their_channels():
    net = Toy(
        lambda net, x: net.head(torch.cat([net.a(x), net.b(x.flip(2))], 1)),
        a=conv(3, 4),
        b=conv(3, 4),
        head=conv(8, 2),
    )
    net.b.weight = net.a.weight
    every = (0, 1, 2, 3)
    assert drawn(net) == {"b": (4, {("b.weight", 0, every), ("head.weight", 1, (0, 4, 1, 5, 2, 6, 3, 7))})}


def test_a_residual_through_a_permute_is_followed():
    def run(net, x):
        x = net.stem(x)
        y = net.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return net.head(x + y)

    every = (0, 1, 2, 3)
    found = drawn(Toy(run, stem=conv(3, 4), mix=nn.Linear(4, 4, bias=False), head=conv(4, 2)))
    assert found == {
        "stem": (
            4,
            {("stem.weight", 0, every), ("mix.weight", 0, every), ("mix.weight", 1, every), ("head.weight", 1, every)},
        )
    }


class Attention(nn.Module):
    """Three heads of four channels, [B, H, W, 5] in and out, as most transformers write it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.qkv, self.proj = 3, nn.Linear(5, 36), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, height * width, 3, self.num_heads, 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q @ k.mT) / 2).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(batch, height, width, -1))


def attending() -> nn.Module:
    def run(net, x):
        x = net.stem(x).permute(0, 2, 3, 1)
        return net.head((x + net.attention(net.norm(x))).permute(0, 3, 1, 2))

    return Toy(run, stem=conv(3, 5), norm=nn.LayerNorm(5), attention=Attention(), head=conv(5, 2))


def test_attention_heads_go_whole_with_query_key_value_and_projection():
    size, slots = drawn(attending())["attention.qkv"]
    positions = [h * 4 + d + part * 12 for h in range(3) for part in range(3) for d in range(4)]
    assert size == 3
    assert slots == {
        ("attention.qkv.weight", 0, tuple(positions)),
        ("attention.qkv.bias", 0, tuple(positions)),
        ("attention.proj.weight", 1, tuple(range(12))),
    }


def test_norms_over_channels_say_which_of_them_count():
    groups = {g.name: g for g in trace_network(attending().eval(), (3, 8, 8)).groups}
    found = {(s.tensor, s.role, s.index) for s in groups["stem"].slots if "norm" in s.tensor}
    every = (0, 1, 2, 3, 4)
    assert found == {
        ("norm.weight", "affine", every),
        ("norm.bias", "affine", every),
        ("norm.weight#gone", "statistics", every),
    }


def test_group_norm_loses_whole_groups():
    found = drawn(
        Toy(lambda net, x: net.head(net.norm(net.stem(x))), stem=conv(3, 6), norm=nn.GroupNorm(3, 6), head=conv(6, 2))
    )
    assert found["stem"][0] == 3 and ("head.weight", 1, (0, 1, 2, 3, 4, 5)) in found["stem"][1]


def test_a_cut_that_the_networks_own_code_does_not_go_along_with_is_frozen():
    """The number 4 stands in the code, where no cut can change it."""

    net = Toy(lambda net, x: net.head(net.stem(x).view(x.shape[0], 4, 8, 8)), stem=conv(3, 4), head=conv(4, 2))
    trace = trace_network(net.eval(), (3, 8, 8))
    assert not any(g.frozen for g in trace.groups if g.name == "stem")
    frozen = {g.name: g.frozen for g in check_groups(net, trace, torch.Generator().manual_seed(0)).groups}
    assert "does not run" in frozen["stem"]


def too_large() -> None:
    torch.empty(2**48)  # a pebibyte, which PyTorch's own allocator refuses


def raises(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


LACKS = {
    "MemoryError": raises(MemoryError()),
    "OutOfMemoryError": raises(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")),
    "can't allocate": too_large,
    "not enough": raises(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.")),
    "MPS": raises(RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, max allowed: 9.07 GB).")),
}


@pytest.mark.parametrize("lack", LACKS)
@pytest.mark.parametrize("step", ["trace", "cut"])
def test_a_lack_of_memory_is_not_taken_for_a_fault_of_the_network(lack, step):
    """It ends the run: the group could be cut, and would be left alone in silence."""

    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = net.stem(x)
        if step == "trace" or y.shape[1] < 4:
            LACKS[lack]()
        return net.head(y)

    net = Toy(forward, stem=conv(3, 4), head=conv(4, 2)).eval()
    with pytest.raises((MemoryError, RuntimeError), match=r"memory|^$") as caught:
        check_groups(net, trace_network(net, (3, 8, 8)), torch.Generator().manual_seed(0))
    assert not isinstance(caught.value, CampHiVeError)


def test_regions_under_a_context_of_their_own_are_followed():
    """Autocast switched off and `no_grad` within a network: export keeps a graph of its own for each."""

    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            y, z = net.a(x).relu(), net.b(x)
            with torch.no_grad():
                y = y * 2
        return net.head(torch.cat([y, z], dim=1))

    net = Toy(forward, a=conv(3, 4), b=conv(3, 2), head=conv(6, 2))
    assert drawn(net) == drawn(
        Toy(
            lambda net, x: net.head(torch.cat([net.a(x).relu() * 2, net.b(x)], dim=1)),
            a=conv(3, 4),
            b=conv(3, 2),
            head=conv(6, 2),
        )
    )
    x = images(2)
    graph = trace_network(net.double(), (3, 8, 8)).graph
    torch.testing.assert_close(graph.run(named_tensors(net), x)[0], net(x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("what", ["autocast", "cond"])
def test_other_operations_with_graphs_of_their_own_are_refused(what):
    """Neither the precision nor the branch that runs may be guessed."""

    def autocast(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu"):
            return net.a(x).relu().float()

    def cond(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda x: net.a(x), lambda x: 2 * net.a(x), (x,))

    with pytest.raises(ModelError, match=rf"{what}.* has a graph of its own"):
        trace_network(Toy({"autocast": autocast, "cond": cond}[what], a=conv(3, 4)).eval(), (3, 8, 8))
