"""Merge rules on four channels worked by hand, and on networks whose channels repeat."""

import numpy as np
import pytest
import torch
from support.plans import plan_with
from support.toys import Chain, ToyResNet, images, randomise, relative_error
from torch import nn

from hf_camphive.core.methods import MERGE_RULES
from hf_camphive.core.plan import PrunePlan
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.pruning.merging.rules import (
    ConsumerCut,
    cyclic,
    cyclic_ls,
    cyclic_pairs,
    lstsq,
    merge,
    nearest,
    none,
    with_pairs,
)
from hf_camphive.pruning.merging.task import MergeTask

# Four channels seen four times: 2 = 3 * channel 0, and 3 = channel 1 + 1.
ACTIVATIONS = torch.tensor([[1.0, 0, 3, 1], [2, 1, 6, 2], [0, 2, 0, 3], [1, 5, 3, 6]], dtype=torch.float64)


def cut(pairs=()) -> ConsumerCut:
    return ConsumerCut(4, (0, 1), pairs, ACTIVATIONS.mean(0), ACTIVATIONS.T @ ACTIVATIONS / 4, ridge=0.0)


def test_cyclic_pairs_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.3, 0.2, 0.8, 0.4, 0.0])
    assert cyclic_pairs(scores, (1, 4)) == ((5, 1), (2, 4), (3, 1), (0, 4), (6, 1))
    assert cyclic_pairs(scores, ()) == ()


def test_pairwise_rules_by_hand():
    pairs = ((2, 1), (3, 0))
    assert not none(cut(pairs))[0].any()
    rows, constant = cyclic(cut(pairs))
    assert rows[2].tolist() == [0, 0.5, 0, 0] and rows[3].tolist() == [0.5, 0, 0, 0] and not constant.any()
    rows, _ = cyclic_ls(cut(pairs))
    assert rows[2, 1] == (6 + 15) / (1 + 4 + 25) and rows[3, 0] == (1 + 4 + 6) / (1 + 4 + 1)
    rows, _ = nearest(cut())
    np.testing.assert_allclose(rows[2], [3, 0, 0, 0])
    np.testing.assert_allclose(rows[3], [0, (2 + 6 + 30) / 30, 0, 0])


def test_lstsq_is_numpys_regression_with_a_constant():
    rows, constant = lstsq(cut())
    np.testing.assert_allclose(rows[2:, :2], [[3, 0], [0, 1]], atol=1e-12)
    np.testing.assert_allclose(constant, [0, 0, 0, 1], atol=1e-12)


class Reader(nn.Module):
    """Four channels of one pixel, as ACTIVATIONS gives them, read by one linear layer with a bias."""

    WEIGHT = torch.tensor([[1.0, 2, 4, 8], [0, -1, 1, 6]], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 4, 1, bias=False), nn.Linear(4, 2)
        self.conv.weight.data.copy_(torch.eye(4).view(4, 4, 1, 1))
        self.head.weight.data.copy_(self.WEIGHT)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


# Channels 0 and 1 stay. By score 0 > 1 > 2 > 3, so that 2 meets 0 and 3 meets 1; E[a2 a0] / E[a0^2] = 3 and
# E[a3 a1] / E[a1^2] = (2 + 6 + 30) / 30; the best fit is a2 = 3 a0, a3 = a1 + 1.
BETA = 38 / 30
READER_BY_HAND = {
    "none": ([[1, 2], [0, -1]], [0, 0]),
    "cyclic": ([[1 + 2, 2 + 4], [0.5, -1 + 3]], [0, 0]),
    "cyclic-ls": ([[1 + 12, 2 + 8 * BETA], [3, -1 + 6 * BETA]], [0, 0]),
    "nearest": ([[1 + 12, 2 + 8 * BETA], [3, -1 + 6 * BETA]], [0, 0]),
    "lstsq": ([[1 + 12, 2 + 8], [3, -1 + 6]], [8, 6]),
    "reconstruct": ([[1 + 12, 2 + 8], [3, -1 + 6]], [8, 6]),
}


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_every_rule_on_four_channels_by_hand(rule):
    net = Reader().eval().double()
    trace = trace_network(net, (4, 1, 1))
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    plan = planned(trace, {"conv": (0, 1)}, rule)
    merged = merge(MergeTask(state, plan, trace, [ACTIVATIONS.view(4, 4, 1, 1)], ridge=1e-12))
    weight, bias = READER_BY_HAND[rule]
    np.testing.assert_allclose(merged["head.weight"][:, :2], weight, rtol=1e-8)
    assert not merged["head.weight"][:, 2:].any()
    np.testing.assert_allclose(merged["head.bias"] - state["head.bias"], bias, atol=1e-8)


def prepared(net):
    net = randomise(net)
    trace = trace_network(net, (3, 8, 8))
    return net, trace, {name: tensor.detach() for name, tensor in named_tensors(net).items()}


def planned(trace, keep, rule) -> PrunePlan:
    from dataclasses import replace

    plan = replace(plan_with(trace, keep), merge=rule)
    return with_pairs(plan, {g.name: -torch.arange(float(g.size)) for g in trace.groups})


@pytest.mark.parametrize(("rule", "share"), [("none", 0.0), ("cyclic", 0.5)])
@pytest.mark.parametrize("groups", [1, 2])
def test_rules_without_data_lose_nothing_where_their_coefficient_is_the_truth(rule, share, groups):
    """The last channel is `share` of the first, which relu passes on: `none` takes it for 0, `cyclic` for a half."""
    _, trace, state = prepared(Chain(groups))
    for name in ("conv1.weight", "conv1.bias"):
        state[name] = state[name].clone()
        state[name][-1] = share * state[name][0]
    keep = tuple(range(7)) if groups == 1 else (0, 1, 2)
    if groups == 2:  # channels 0 to 3 and 4 to 7 are tied: channel c of the group sits at c and c + 4
        for name in ("conv1.weight", "conv1.bias"):
            state[name][3], state[name][7] = share * state[name][0], share * state[name][4]
    plan, x = planned(trace, {"conv1": keep}, rule), images(4)
    with torch.no_grad():
        merged = merge(MergeTask(state, plan, trace, []))
        assert relative_error(trace.graph.run(merged, x)[0], trace.graph.run(state, x)[0]) < 1e-12
        assert not torch.equal(merged["conv2.weight"], state["conv2.weight"])


@pytest.mark.parametrize("rule", [rule for rule in MERGE_RULES if rule not in ("none", "cyclic")])
@pytest.mark.parametrize("net", [ToyResNet(), Chain(), Chain(groups=2)], ids=["residual", "flatten", "grouped"])
def test_a_channel_that_repeats_another_merges_without_loss(rule, net):
    """The last channel repeats the first, and cyclic pairing pairs just them."""
    net, trace, state = prepared(net)
    keep = {}
    for group in trace.groups:
        if not group.frozen:
            last = group.size - 1
            keep[group.name] = tuple(range(last))
            for slot in group.slots:
                if slot.role != "consumer":
                    where = (
                        torch.tensor(slot.positions([last], group.size)),
                        torch.tensor(slot.positions([0], group.size)),
                    )
                    tensor = state[slot.tensor].clone()
                    state[slot.tensor] = tensor.index_copy_(
                        slot.axis, where[0], tensor.index_select(slot.axis, where[1])
                    )
    plan, x = planned(trace, keep, rule), images(16)
    if MERGE_RULES[rule].pairs:
        assert all(cut.pairs == ((len(cut.keep), 0),) for cut in plan.cuts)
    with torch.no_grad():
        (dense,) = trace.graph.run(state, x)
        merged = merge(MergeTask(state, plan, trace, [x[:9], x[9:]], ridge=1e-12))
        assert relative_error(apply_plan(net, plan, trace, merged)(x), dense) < 1e-6
        assert relative_error(apply_plan(net, plan, trace, state)(x), dense) > 1e-3


def test_cyclic_adds_half_of_each_removed_column_to_its_partner():
    _, trace, state = prepared(ToyResNet())
    plan = planned(trace, {"block1.conv1": (0, 1)}, "cyclic")
    weight, after = (
        state["block1.conv2.weight"],
        merge(MergeTask(state, plan, trace, []))["block1.conv2.weight"],
    )
    torch.testing.assert_close(after[:, 0], weight[:, 0] + 0.5 * (weight[:, 2] + weight[:, 4]))
    torch.testing.assert_close(after[:, 1], weight[:, 1] + 0.5 * weight[:, 3])
    assert not after[:, 2:].any()


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_no_rule_touches_anything_when_nothing_is_cut(rule):
    _, trace, state = prepared(ToyResNet())
    after = merge(MergeTask(state, planned(trace, {}, rule), trace, [images(4)]))
    assert all(torch.equal(after[name], state[name]) for name in state)


def test_lstsq_puts_its_constant_where_the_consumer_can_carry_it():
    """conv1's removed channel is constant: lstsq moves it into conv2's bias, exactly (no padding effects: 1x1)."""
    _, trace, state = prepared(Chain())
    state["conv2.weight"] = state["conv2.weight"] * torch.tensor(
        [[0, 0, 0], [0, 1.0, 0], [0, 0, 0]], dtype=torch.float64
    )
    state["conv1.weight"] = state["conv1.weight"].clone()
    state["conv1.weight"][5] = 0
    state["conv1.bias"] = state["conv1.bias"].clone()
    state["conv1.bias"][5] = 1.5
    plan, x = planned(trace, {"conv1": (0, 1, 2, 3, 4, 6, 7)}, "lstsq"), images(8)
    with torch.no_grad():
        merged = merge(MergeTask(state, plan, trace, [x], ridge=1e-12))
        assert relative_error(trace.graph.run(merged, x)[0], trace.graph.run(state, x)[0]) < 1e-9
    torch.testing.assert_close(
        merged["conv2.bias"] - state["conv2.bias"], 1.5 * state["conv2.weight"][:, 5].sum((1, 2))
    )
