"""Widening leaves the function as it is, everywhere; its copies can part in training, and pruning takes them away again."""

import copy
from dataclasses import replace

import pytest
import timm
import torch
from support.toys import Chain, ToyResNet, images, randomise, relative_error

from hf_camphive.core.errors import PlanError
from hf_camphive.core.plan import ChannelCut, ChannelGroup, PrunePlan
from hf_camphive.network.graph.blocks import droppable_branches
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.modeling.resizing import shortcuts_of, widths_of
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.network.surgery.widening import draw_widenings, expand

TOYS = {"resnet": (ToyResNet, 8), "flattened": (Chain, 8), "grouped": (lambda: Chain(2), 8)}
ZOO = {
    "mobilenetv3_small_050": {},
    "seresnext26d_32x4d": {},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2)},
}


def built(name: str) -> tuple[torch.nn.Module, int]:
    if name in TOYS:
        make, size = TOYS[name]
        return randomise(make()), size
    return randomise(timm.create_model(name, **ZOO[name])), 32


def widths(net) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in net.named_parameters()}


@pytest.mark.parametrize(
    ("name", "factor"), [*((name, 2.0) for name in TOYS), *((name, 1.3) for name in [*TOYS, *ZOO])]
)
def test_widened_is_the_same_function(name, factor):
    net, size = built(name)
    trace = trace_network(net, (3, size, size))
    before = copy.deepcopy(net.state_dict())
    wide, widenings = expand(net, trace, factor, seed=3)
    with torch.no_grad():
        assert relative_error(wide(images(2, size)), net(images(2, size))) < 1e-10
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())
    free = [group for group in trace.groups if not group.frozen]
    assert [w.group for w in widenings] == [group.name for group in free]
    for group, widening in zip(free, widenings):
        assert len(widening.sources) == max(group.size + 1, round(factor * group.size)), group.name


@pytest.mark.parametrize("name", list(TOYS))
def test_pruning_the_copies_gives_the_network_back(name):
    net, size = built(name)
    wide, widenings = expand(net, trace_network(net, (3, size, size)), 1.6)
    trace = trace_network(wide, (3, size, size))
    state = dict(named_tensors(wide))
    groups = {group.name: group for group in trace.groups}
    assert all(groups[w.group].size == len(w.sources) and not groups[w.group].frozen for w in widenings)
    for widening in widenings:  # merge: what reads a copy reads its original instead
        for slot in groups[widening.group].consumers():
            weight = state[slot.tensor].detach().clone()
            for i, source in enumerate(widening.sources):
                first = widening.sources.index(source)
                if first != i:
                    group = groups[widening.group]
                    kept, gone = (torch.tensor(slot.positions([c], group.size)) for c in (first, i))
                    weight.index_add_(slot.axis, kept, weight.index_select(slot.axis, gone))
            state[slot.tensor] = weight
    cuts = tuple(ChannelCut(widening.group, widening.originals) for widening in widenings)
    plan = PrunePlan(trace.groups, (), cuts, (), "random", "none", 2, 1)
    back = apply_plan(wide, plan, trace, state)
    assert widths(back) == widths(net)
    for key, tensor in net.state_dict().items():
        torch.testing.assert_close(back.state_dict()[key], tensor, rtol=1e-12, atol=1e-14)


def test_groups_are_chosen_by_name_and_the_rest_stays():
    net = randomise(ToyResNet())
    wide, (widening,) = expand(net, trace_network(net, (3, 8, 8)), 2, ["block1.conv1"])
    changed = {name for name, shape in widths(wide).items() if shape != widths(net)[name]}
    assert changed == {f"block1.{name}" for name in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")}
    assert wide.block1.conv1.weight.shape[0] == 10 and widening.size == 5
    assert widening.sources == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4) and widening.originals == (0, 2, 4, 6, 8)


def test_a_shortcut_s_constant_is_widened_too():
    net = randomise(ToyResNet())
    trace = trace_network(net, (3, 8, 8))
    plan = PrunePlan(
        trace.groups, droppable_branches(trace), (ChannelCut("block1.conv1", ()),), ("block1",), "random", "none", 2, 1
    )
    small = apply_plan(net, plan, trace)
    wide, _ = expand(small, trace_network(small, (3, 8, 8)), 2)
    assert wide.block1.constant.shape == (12,) and shortcuts_of(wide) == shortcuts_of(small)
    with torch.no_grad():
        assert relative_error(wide(images(2)), small(images(2))) < 1e-10


def test_shares_sum_to_one_and_every_channel_has_its_turn():
    group = ChannelGroup("a", 10, ())
    (widening,) = draw_widenings([group], 3.5, spread=0.5, seed=1)
    assert widening == draw_widenings([group], 3.5, spread=0.5, seed=1)[0]
    assert widening != draw_widenings([group], 3.5, spread=0.5, seed=2)[0]
    counts = [widening.sources.count(c) for c in range(10)]
    assert sorted(counts) == [3] * 5 + [4] * 5 and list(widening.sources) == sorted(widening.sources)
    for channel, count in enumerate(counts):
        shares = [s for source, s in zip(widening.sources, widening.shares) if source == channel]
        assert sum(shares) == pytest.approx(1, abs=1e-15) and len(set(shares)) == count
        assert all(0.5 / 1.5 <= share * count <= 1.5 / 0.5 for share in shares)


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_training_tells_copies_apart_only_if_their_shares_differ(spread):
    net = randomise(ToyResNet())
    wide, _ = expand(net, trace_network(net, (3, 8, 8)), 2, ["block1.conv1"], spread=spread)
    wide.train()
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wide(images(4, seed=step)), torch.tensor([0, 1, 2, 0])).backward()
        optimizer.step()
    weight = wide.block1.conv1.weight.detach()
    apart = (weight[0::2] - weight[1::2]).abs().max() / weight.abs().max()
    assert apart > 1e-4 if spread else apart < 1e-12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"groups": ["block1.conv"]}, "no channel group 'block1.conv'; did you mean 'block1.conv1'"),
        ({"groups": ["head"]}, "'head' cannot be widened: output of the network"),
        ({"factor": 1.0}, "factor is 1.0"),
        ({"factor": float("nan")}, "factor is nan"),
        ({"spread": 1.0}, "spread is 1.0"),
    ],
)
def test_what_cannot_be_widened_is_refused(arguments, message):
    net = randomise(ToyResNet())
    with pytest.raises(PlanError, match=message):
        expand(net, trace_network(net, (3, 8, 8)), **arguments)


def test_a_coupling_that_is_not_understood_is_refused_by_name():
    """A group that misses one of its slots moves the output."""
    net = randomise(ToyResNet())
    trace = trace_network(net, (3, 8, 8))

    def maimed(group):
        if group.name != "block1.conv1":
            return group
        return replace(
            group, slots=tuple(replace(s, index=s.index[::-1]) if s.role == "consumer" else s for s in group.slots)
        )

    with pytest.raises(PlanError, match=r"splitting the channels of block1\.conv1 moves the output"):
        expand(net, replace(trace, groups=tuple(map(maimed, trace.groups))), 1.5)


def test_wider_than_its_base_is_rebuilt_from_the_widths_alone():
    net = randomise(timm.create_model("mobilenetv3_small_050"))
    wide, _ = expand(net, trace_network(net, (3, 32, 32)), 1.5)
    rebuilt = timm.create_model("camphive", base="mobilenetv3_small_050", widths=widths_of(wide)).double().eval()
    rebuilt.load_state_dict(wide.state_dict())
    assert torch.equal(rebuilt(images(2, 32)), wide(images(2, 32)))
