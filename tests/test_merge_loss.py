"""The loss of a merge against the network's own Jacobian, and what must cost nothing."""

import pytest
import torch
from test_criteria import evidence
from toys import Chain, images, randomise

from hf_camphive.criteria import CRITERIA
from hf_camphive.gates import gate_space
from hf_camphive.graph import named_tensors
from hf_camphive.merge_loss import consumer_products, merge_losses, mergeable
from hf_camphive.tracing import trace_network

GROUP, READER = "block1.conv1", "block1.conv2.weight"


def products_of(subject, z, name: str = GROUP):
    x = torch.cat(subject.images)
    ((_, m, s),) = consumer_products(subject.trace, subject.state, frozenset([name]), x, lambda logits: z)
    return m, s


def random_products(channels: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn(20, channels, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    a = torch.cat([a, torch.ones_like(a[:, :1])], dim=1)
    flat = a.transpose(0, 1).flatten(1)
    return g @ a.mT, flat @ flat.T


def test_products_are_the_logits_answer_to_a_merge():
    """sum_st D_st M_nst = z_n^T J_n d for the change of weights d that reads sum_t D_st a_t more for every channel s."""
    subject = evidence()
    z = torch.randn(12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    m, _ = products_of(subject, z)
    mix = torch.randn(5, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weight = subject.state[READER]
    change = torch.einsum("osij,st->otij", weight, mix)

    def logits(w):
        return subject.trace.graph.run({**subject.state, READER: w}, torch.cat(subject.images))[0]

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


def test_many_channels_go_in_rounds_and_all_get_a_score():
    m, s = random_products(150)
    scores = merge_losses(m, s)
    assert scores.shape == (150,) and scores.isfinite().all() and (scores > 0).all()


def test_a_group_that_is_not_read_channel_by_channel_is_judged_by_removal():
    net = randomise(Chain(groups=2))
    trace = trace_network(net, (3, 8, 8))
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    assert mergeable(trace, gate_space(trace, state)) == frozenset()
    subject = evidence(Chain())
    assert mergeable(subject.trace, gate_space(subject.trace, subject.state)) == {"conv1"}  # conv2 is flattened
    scores = CRITERIA["merge-aware"](subject)
    assert all((values > 0).any() for values in scores.values())
    assert images(1).dtype == torch.float64
