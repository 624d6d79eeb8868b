"""The loss of a merge against the network's own Jacobian, and what must cost nothing."""

import pytest
import torch
from support.scoring import context
from support.toys import Chain, images, randomise

from hf_camphive.curvature.cotangents import curvature_cotangent
from hf_camphive.curvature.gates import GatedNetwork
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.pruning.scoring import criteria
from hf_camphive.pruning.scoring.criteria import SCORERS
from hf_camphive.pruning.scoring.merge_loss import (
    consumer_products,
    joint_losses,
    merge_losses,
    merge_moves,
    mergeable,
)
from hf_camphive.pruning.scoring.sosp import channel_costs
from hf_camphive.pruning.tuning import SCORE_TEMPERATURE

GROUP, READER = "block1.conv1", "block1.conv2.weight"


def products_of(subject, z, name: str = GROUP):
    x = torch.cat(subject.calibration.images)
    ((_, m, s),) = consumer_products(subject.network, frozenset([name]), x, lambda logits: z)
    return m, s


def random_products(channels: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(20, channels, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    flat = a.transpose(0, 1).flatten(1)
    return g @ a.mT, flat @ flat.T


def test_products_are_the_logits_answer_to_a_merge():
    """sum_st D_st M_nst = z_n^T J_n d for the change of weights d that reads sum_t D_st a_t more for every channel s."""
    subject = context()
    z = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m, _ = products_of(subject, z)
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = subject.analysis.state[READER]
    change = torch.einsum("osij,st->otij", weight, mix)

    def logits(w):
        return subject.trace.graph.run({**subject.analysis.state, READER: w}, torch.cat(subject.calibration.images))[0]

    moved = torch.func.jvp(logits, (weight,), (change,))[1]
    torch.testing.assert_close((m[:, :, :-1] * mix).sum((1, 2)), (z * moved).sum(1), rtol=1e-8, atol=1e-10)


def test_the_first_to_go_costs_what_regression_leaves():
    m, s = random_products(4)
    scores = merge_losses(m, s, ridge=0)
    costs = []
    for channel in range(4):
        others = [t for t in range(5) if t != channel]
        b = torch.linalg.solve(s[others][:, others], s[others, channel])
        costs.append(float(0.5 * (m[:, channel, channel] - m[:, channel, others] @ b).square().sum()))
    assert float(scores.min()) == pytest.approx(min(costs), rel=1e-8)
    assert int(scores.argmin()) == costs.index(min(costs))


def test_the_second_to_go_is_judged_with_what_it_took_over():
    """Both steps by hand: after s went, what reads t reads b_st more of it."""
    m, s = random_products(3, seed=3)
    scores = merge_losses(m, s, ridge=0)
    first = int(scores.argmin())
    others = [t for t in range(4) if t != first]
    b = torch.linalg.solve(s[others][:, others], s[others, first])
    m = m[:, others[:-1]][:, :, others] + b[:-1, None] * m[:, first, others][:, None]
    s = s[others][:, others]
    costs = []
    for channel in range(2):
        rest = [1 - channel, 2]
        b = torch.linalg.solve(s[rest][:, rest], s[rest, channel])
        costs.append(float(0.5 * (m[:, channel, channel] - m[:, channel, rest] @ b).square().sum()))
    assert float(scores.sort().values[1]) == pytest.approx(max(min(costs), float(scores.min())), rel=1e-8)


def test_what_the_others_predict_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(20, 5, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    a[:, 3] = 2 * a[:, 0] - a[:, 1] + 0.7
    a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    flat = a.transpose(0, 1).flatten(1)
    scores = merge_losses(g @ a.mT, flat @ flat.T, ridge=1e-12)
    plain = 0.5 * (g * a[:, :-1]).sum(2).square().sum(0)
    assert scores.min() < 1e-9 * plain.min() and int((scores < 1e-6 * plain.min()).sum()) == 1


def test_moves_are_what_each_merge_adds_to_the_logits():
    """Their sum is the move of merging all channels into the constant, whatever the order: by the products alone."""
    m, s = random_products(5)
    order, moves = merge_moves(m, s, ridge=0)
    assert sorted(order.tolist()) == list(range(5))
    means = s[:-1, -1] / s[-1, -1]
    together = (m[:, :, :-1].diagonal(dim1=1, dim2=2) - means * m[:, :, -1]).sum(1)
    torch.testing.assert_close(moves.sum(0), together, rtol=1e-8, atol=1e-8)


def test_joint_losses_by_hand():
    # X = 0:       a1 adds 1/2 |(1, 0)|^2 = 0.5 for 1, b1 adds 1/2 |(0, 2)|^2 = 2 for 2, so 1 each: a1 goes
    # X = (1, 0):  a2 = (3, 0) adds 3 + 4.5 = 7.5, b1 adds 2, so 1 each: b1 goes
    # X = (1, 2):  a2 adds 7.5, b2 = (0, -2) adds -4 + 2 = -2, less than what went before: b2 goes at b1's price, 1
    # X = (1, 0):  a2 is left, 7.5
    a = torch.tensor([[3.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.0, 2.0], [0.0, -2.0]], dtype=torch.float64)
    scores = joint_losses({"a": (torch.tensor([1, 0]), a), "b": (torch.tensor([0, 1]), b)}, {"a": 1.0, "b": 2.0})
    torch.testing.assert_close(scores["a"], torch.tensor([7.5, 0.5], dtype=torch.float64))
    torch.testing.assert_close(scores["b"], torch.tensor([2.0, 2.0], dtype=torch.float64))
    assert scores["b"][0] < scores["b"][1]  # the order is not lost


def test_merges_are_judged_together():
    """Every score is the largest increase per cost so far of 1/2 |sum of all moves|^2, along the order of score per cost."""
    subject = context(criterion="merge-joint", scope="all")
    scores, costs = SCORERS["merge-joint"](subject), channel_costs(subject)
    names = mergeable(subject.network)
    assert names == set(costs) == set(scores)
    signs = subject.signs()
    moves = {}
    for name in names:
        sums = [
            consumer_products(subject.network, frozenset([name]), x, cotangent_of(signs[numbers]))
            for x, numbers in zip(subject.calibration.images, subject.calibration.indices)
        ]
        parts = [(m, s) for found in sums for _, m, s in found]
        readers = len(parts) // len(subject.calibration.images)
        m = sum(torch.cat([part[0] for part in parts[reader::readers]]) for reader in range(readers))
        moves[name] = merge_moves(m / subject.total**0.5, sum(part[1] for part in parts))[1]
    prices = {(name, c): float(scores[name][c]) / costs[name] for name in names for c in range(len(scores[name]))}
    x, highest, loss = 0, 0.0, 0.0
    for (name, c), price in sorted(prices.items(), key=lambda item: item[1]):
        x = x + moves[name][c]
        after = float(0.5 * x @ x)
        highest = max(highest, (after - loss) / costs[name])
        assert price == pytest.approx(highest, rel=1e-6)
        loss = after


def test_groups_that_are_judged_together_sum_the_same_images(monkeypatch):
    """As many sums as memory allows for all of them, though each alone could have more."""
    monkeypatch.setattr(criteria, "MIN_SUMS", 1)
    monkeypatch.setattr(criteria, "MAX_ELEMENTS_PER_GROUP", 150)
    monkeypatch.setattr(criteria, "MAX_ELEMENTS_TOGETHER", 500)
    scores = SCORERS["merge-joint"](context(scope="all"))
    assert all(values.isfinite().all() and (values > 0).all() for values in scores.values())


def cotangent_of(signs):
    return lambda logits: curvature_cotangent(logits, signs=signs, temperature=SCORE_TEMPERATURE)


def test_many_channels_go_in_rounds_and_all_get_a_score():
    m, s = random_products(150)
    scores = merge_losses(m, s)
    assert scores.shape == (150,) and scores.isfinite().all() and (scores > 0).all()


def test_a_group_that_is_not_read_channel_by_channel_is_judged_by_removal():
    net = randomise(Chain(groups=2))
    trace = trace_network(net, (3, 8, 8))
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    assert mergeable(GatedNetwork(trace, state)) == frozenset()
    subject = context(Chain())
    assert mergeable(subject.network) == {"conv1"}  # conv2 is flattened
    scores = SCORERS["merge-aware"](subject)
    assert all((values > 0).any() for values in scores.values())
    assert images(1).dtype == torch.float64
