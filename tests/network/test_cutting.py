"""masked = shrunk, the oracle of tracing and surgery, and what cutting must leave alone."""

import copy

import pytest
import timm
import torch
from support.plans import plan_with, random_plan
from support.tiers import first_by_default
from support.toys import Chain, ToyResNet, images, randomise, relative_error

from hf_camphive.core.errors import ModelError, PlanError
from hf_camphive.network.graph.program import export_graph, named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.surgery.cutting import apply_plan, mask_state
from hf_camphive.network.surgery.verification import check_groups

NETWORKS = [
    "resnet18",
    "resnet50",
    "resnet26d",
    "seresnet50",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "cifar_resnet56",
    "resnext50_32x4d",
    "ghostnet_100",
]


@pytest.mark.parametrize("name", first_by_default(NETWORKS))
def test_masked_is_shrunk(name):
    net = randomise(timm.create_model(name))
    size = (3, 32, 32) if "cifar" in name else (3, 64, 64)
    trace = check_groups(net, trace_network(net, size), torch.Generator().manual_seed(0))
    assert [g.frozen for g in trace.groups if g.frozen] == ["output of the network"]
    plan = random_plan(net, trace, seed=1, share=0.4)
    small = apply_plan(net, plan, trace)
    x = images(2, size[1])
    with torch.no_grad():
        (masked,) = trace.graph.run(mask_state(named_tensors(net), plan), x)
        assert relative_error(small(x), masked) < 1e-9
        assert relative_error(net(x), masked) > 1e-3  # the plan did remove something that mattered
    macs = trace_network(small, size)
    sizes = {key: p.numel() for key, p in small.named_parameters()}
    assert (
        sum(count * sizes[key] for key, count in macs.positions.items()) == plan.macs_after <= 0.4 * plan.macs_before
    )


def test_dropped_branches_leave_their_constant():
    net = randomise(ToyResNet())
    trace = trace_network(net, (3, 8, 8))
    plan = plan_with(
        trace,
        {"block1.conv1": (), "block2.conv1": (), "stem": (0, 2, 5), "block2.conv2": (1, 2)},
        ("block1", "block2"),
    )
    small = apply_plan(net, plan, trace)
    x = images(2)
    with torch.no_grad():
        assert relative_error(small(x), trace.graph.run(mask_state(named_tensors(net), plan), x)[0]) < 1e-12
    assert not any("conv1" in name for name, _ in small.named_parameters())
    assert small.block1.constant.shape == (3,) and small.block2.constant.abs().min() > 0


@pytest.mark.parametrize("groups", [1, 2])
def test_flattened_and_grouped_channels_are_cut(groups):
    net = Chain(groups).eval().double()
    trace = trace_network(net, (3, 8, 8))
    plan = plan_with(trace, {"conv1": (0, 3), "conv2": (1, 2, 3)})
    small = apply_plan(net, plan, trace)
    x = images(2)
    assert relative_error(small(x), trace.graph.run(mask_state(named_tensors(net), plan), x)[0]) < 1e-12
    assert small.conv2.groups == groups and small.head.in_features == 16 * 3 * groups


def test_nothing_cut_is_the_same_network_bit_for_bit():
    net = randomise(ToyResNet())
    trace = trace_network(net, (3, 8, 8))
    same = apply_plan(net, plan_with(trace, {}), trace)
    for (name, before), after in zip(net.state_dict().items(), same.state_dict().values()):
        assert torch.equal(before, after), name


def test_the_original_and_its_ways_are_left_alone():
    net = ToyResNet().to(memory_format=torch.channels_last).train()
    net.stem.weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    trace = trace_network(net, (3, 8, 8))
    small = apply_plan(net, plan_with(trace, {"block1.conv1": (0, 1), "stem": (0, 1, 2)}), trace)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert small.training and not small.stem.weight.requires_grad and small.block1.conv1.weight.requires_grad
    assert small.block2.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    small(torch.randn(2, 3, 8, 8)).sum().backward()
    assert small.block1.conv1.weight.grad.shape == (2, 3, 3, 3)


def test_modules_keep_their_own_modes(monkeypatch):
    """A frozen BatchNorm in a network that is being trained: tracing, cutting and dropping a block leave it frozen."""
    net = ToyResNet().train()
    net.block1.bn1.eval()
    net.block2.downsample.eval()
    modes = {name: module.training for name, module in net.named_modules()}
    trace = trace_network(net, (3, 8, 8))
    assert {name: module.training for name, module in net.named_modules()} == modes
    plan = plan_with(trace, {"block1.conv1": (0, 1), "block2.conv1": ()}, ("block2",))
    small = apply_plan(net, plan, trace)
    assert {name: module.training for name, module in net.named_modules()} == modes
    found = {name: module.training for name, module in small.named_modules()}
    assert found == {name: modes[name] for name in found} and not found["block2.downsample.1"] and found["block2"]

    def fails(x: torch.Tensor) -> None:
        raise ValueError("of its own")

    monkeypatch.setattr(net, "forward", fails)
    with pytest.raises(ModelError, match="of its own"):
        export_graph(net, (3, 8, 8))
    assert {name: module.training for name, module in net.named_modules()} == modes


def test_pruning_again_works_on_what_pruning_left():
    net = randomise(ToyResNet())
    trace = trace_network(net, (3, 8, 8))
    once = apply_plan(net, plan_with(trace, {"block1.conv1": ()}, ("block1",)), trace)
    trace = trace_network(once, (3, 8, 8))
    plan = plan_with(trace, {"stem": (1, 4), "block2.conv1": (0,)})
    twice = apply_plan(once, plan, trace)
    x = images(2)
    with torch.no_grad():
        assert relative_error(twice(x), trace.graph.run(mask_state(named_tensors(once), plan), x)[0]) < 1e-12
    assert twice.block1.constant.shape == (2,)


def test_a_plan_for_another_network_is_refused():
    trace = trace_network(timm.create_model("cifar_resnet20").eval(), (3, 32, 32))
    net = ToyResNet().eval()
    with pytest.raises(PlanError, match=r"expects axis \d of .* the plan was made for another network"):
        apply_plan(net, plan_with(trace, {"layer1.0.conv1": (0,)}), trace_network(net, (3, 8, 8)))


def test_duplicated_channels_merge_without_loss_everywhere():
    """Copy channel 0 onto 1 in every group, add column 1 to column 0, remove 1: nothing moves."""
    net = randomise(timm.create_model("resnet18"))
    trace = trace_network(net, (3, 64, 64))
    state = named_tensors(net)
    free = [g for g in trace.groups if not g.frozen]
    for group in free:
        for slot in group.slots:
            if slot.role != "consumer":
                state[slot.tensor] = (
                    state[slot.tensor]
                    .detach()
                    .clone()
                    .index_copy_(slot.axis, torch.tensor([1]), state[slot.tensor].detach().narrow(slot.axis, 0, 1))
                )
    x = images(2, 64)
    with torch.no_grad():
        (before,) = trace.graph.run(state, x)
        for group in free:
            for slot in group.consumers():
                weight = state[slot.tensor].detach().clone()
                weight.narrow(slot.axis, 0, 1).add_(weight.narrow(slot.axis, 1, 1))
                state[slot.tensor] = weight
        keep = {g.name: (0, *range(2, g.size)) for g in free}
        small = apply_plan(net, plan_with(trace, keep), trace, state)
        assert relative_error(small(x), before) < 1e-12
