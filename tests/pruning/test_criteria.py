"""Each criterion against its formula, and the laws that all of them keep."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.scoring import WEIGHT_SPACE, SmallResNet, context, subject_for, with_state
from support.tiers import first_by_default, slow_ones
from support.toys import ToyResNet
from torch import Tensor, nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.methods import CRITERIA
from hf_camphive.curvature.cotangents import label_cotangent
from hf_camphive.curvature.eigensolvers import Eigenpairs, eigenpairs_of
from hf_camphive.curvature.estimators import Estimate, Traces
from hf_camphive.curvature.gates import lift
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.pruning.scoring import weight_space as second_order
from hf_camphive.pruning.scoring.context import ScoringContext
from hf_camphive.pruning.scoring.criteria import SCORERS
from hf_camphive.pruning.scoring.sosp import greedy_marginals
from hf_camphive.training.data.calibration import Calibration


def exact_diagonal(product, size: int, *_, **settings) -> Traces:
    diagonal = product(torch.eye(size, dtype=torch.float64)).diagonal()
    return Traces(Estimate(diagonal, torch.zeros(size)), None, None, size)


def exact_eigenpairs(product, size: int, k: int, *_, **settings) -> Eigenpairs:
    return eigenpairs_of(product(torch.eye(size, dtype=torch.float64)), k)


@pytest.fixture
def exact(monkeypatch):
    """What estimates in weight space are in the limit: otherwise they depend on random starts, and so on orders."""
    monkeypatch.setattr(second_order, "hutchinson", exact_diagonal)
    monkeypatch.setattr(second_order, "power_iteration", exact_eigenpairs)


def changed(subject: ScoringContext, **tensors) -> ScoringContext:
    return with_state(subject, {**subject.analysis.state, **{k.replace("__", "."): v for k, v in tensors.items()}})


def joined(scores) -> torch.Tensor:
    return torch.cat(list(scores.values()))


# Laws over the whole table

IN_WEIGHT_SPACE = {"hap", "hive-paper"}  # whole matrices over weights are made for these: slow


@pytest.mark.parametrize("name", SCORERS)
def test_scores_have_one_finite_number_a_channel_of_every_free_group(name):
    found = SCORERS[name](context(hutchinson_probes=2, power_steps=3))
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "stem": (6,),
        "block1.conv1": (5,),
        "block2.conv1": (7,),
        "block2.conv2": (8,),
    }
    assert joined(found).dtype == torch.float64 and joined(found).isfinite().all()
    assert (joined(found) >= -1e-12).all() or name == "hap"  # an estimate of a trace, of either sign
    assert joined(found).unique().numel() > 20


@pytest.mark.parametrize("name", SCORERS)
def test_rows_tell_what_a_criterion_reads(name):
    subject = subject_for(name)
    given = subject.calibration
    labels = replace(subject, calibration=replace(given, labels=tuple((y + 1) % 3 for y in given.labels)))
    images = replace(subject, calibration=replace(given, images=tuple(x.flip(-1) + 0.5 for x in given.images)))

    def reads(other, **settings):
        settings = {"hutchinson_probes": 4, "num_eigenpairs": 2, **settings}
        a, b = (
            joined(SCORERS[name](replace(each, config=replace(each.config, **settings)))) for each in (subject, other)
        )
        return not torch.allclose(a, b, rtol=1e-6, atol=1e-12)

    row = CRITERIA[name]
    assert (reads(images), reads(labels)) == (row.reads_images, row.reads_labels)
    assert reads(labels, curvature="hessian") == (row.reads_labels or row.uses_curvature)


@pytest.mark.parametrize("name", slow_ones([name for name in SCORERS if name != "random"], IN_WEIGHT_SPACE))
def test_permuting_channels_permutes_scores(name, exact):
    subject = subject_for(name)
    order = torch.tensor([3, 0, 4, 1, 2])
    state = dict(subject.analysis.state)
    for slot in next(g for g in subject.trace.groups if g.name == "block1.conv1").slots:
        state[slot.tensor] = state[slot.tensor].index_select(slot.axis, order)
    before, after = SCORERS[name](subject), SCORERS[name](with_state(subject, state))
    assert before["block1.conv1"].unique().numel() == 5
    torch.testing.assert_close(after["block1.conv1"], before["block1.conv1"][order], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(after["stem"], before["stem"], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "name", slow_ones([name for name in SCORERS if name not in ("random", "bn-scale")], IN_WEIGHT_SPACE)
)
def test_a_channel_that_nobody_reads_scores_zero(name, exact):
    """`bn-scale` does not look at readers."""
    subject = subject_for(name)
    weight = subject.analysis.state["block1.conv2.weight"].clone().index_fill_(1, torch.tensor([2]), 0)
    scores = SCORERS[name](changed(subject, block1__conv2__weight=weight))["block1.conv1"]
    assert (
        scores[2].abs() < 1e-4 * scores[[0, 1, 3, 4]].abs().min()
    )  # 0 but for rounding, and what an iteration leaves


@pytest.mark.parametrize(
    "name", slow_ones([name for name in SCORERS if name not in ("random", "magnitude", "hive-paper")], IN_WEIGHT_SPACE)
)
def test_a_channel_that_is_always_zero_scores_zero(name, exact):
    """`magnitude` looks at readers alone, and |v_i| does not know that a weight is zero.

    With gain and offset 0 the channel is zero for any filter; HAP looks at the filter, which is zero then, too.
    """
    subject = subject_for(name)
    dead = torch.tensor([2])
    tensors = {key: subject.analysis.state[key].clone().index_fill_(0, dead, 0) for key in DEAD}
    scores = SCORERS[name](changed(subject, **tensors))["block1.conv1"]
    assert (
        scores[2].abs() < 1e-4 * scores[[0, 1, 3, 4]].abs().min()
    )  # 0 but for rounding, and what an iteration leaves


DEAD = ("block1.conv1.weight", "block1.bn1.weight", "block1.bn1.bias", "block1.bn1.running_mean")
FACTORS = torch.tensor([0.5, 3.0, 1.0, 2.0, 0.2], dtype=torch.float64)
GATE_SPACE = {"fisher", "hive", "sosp-h", "sosp-i", "taylor"}


@pytest.mark.parametrize("name", slow_ones(SCORERS, IN_WEIGHT_SPACE))
def test_gate_scores_do_not_know_how_a_relu_splits_its_scale(name, exact):
    """relu(a x) = a relu(x): gain and offset times a, readers over a. HAP sees a filter before a norm, which is the same."""
    subject = subject_for(name, nn.ReLU)
    state, columns = subject.analysis.state, FACTORS.view(1, -1, 1, 1)
    scaled = changed(
        subject,
        block1__bn1__weight=state["block1.bn1.weight"] * FACTORS,
        block1__bn1__bias=state["block1.bn1.bias"] * FACTORS,
        block1__conv2__weight=state["block1.conv2.weight"] / columns,
    )
    own, others = same_scores(name, subject, scaled)
    assert own == (name in GATE_SPACE | {"hap", "random"})
    assert others or name not in GATE_SPACE


@pytest.mark.parametrize("name", slow_ones(SCORERS, IN_WEIGHT_SPACE))
def test_scores_do_not_know_the_scale_of_a_filter_before_its_norm(name, exact):
    """Filter, running mean and deviation times a: only |v_i| of CAMP-HiVe, whose matrix scales with 1/a, knows."""
    subject = subject_for(name)
    state = subject.analysis.state
    scaled = changed(
        subject,
        block1__conv1__weight=state["block1.conv1.weight"] * FACTORS.view(-1, 1, 1, 1),
        block1__bn1__running_mean=state["block1.bn1.running_mean"] * FACTORS,
        block1__bn1__running_var=(state["block1.bn1.running_var"] + 1e-5) * FACTORS.square() - 1e-5,
    )
    own, others = same_scores(name, subject, scaled)
    assert own == (name != "hive-paper")
    assert others or name not in GATE_SPACE


def same_scores(name: str, a: ScoringContext, b: ScoringContext) -> tuple[bool, bool]:
    """Whether two states of one function have the same scores in the group that differs, and in all others."""
    with torch.no_grad():
        (expected,), (found,) = (e.trace.graph.run(e.analysis.state, e.calibration.images[0]) for e in (a, b))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    a, b = SCORERS[name](a), SCORERS[name](b)
    same = {g: torch.allclose(a[g], b[g], rtol=1e-4, atol=1e-7 * float(a[g].abs().max())) for g in a}
    return same.pop("block1.conv1"), all(same.values())


@pytest.mark.parametrize("name", SCORERS)
def test_batches_do_not_matter(name):
    net, settings = ToyResNet(), {}
    if name in WEIGHT_SPACE:
        net, settings = SmallResNet(), {"hutchinson_probes": 3, "power_steps": 5}
    a, b = (joined(SCORERS[name](context(net, batches=batches, **settings))) for batches in ((12,), (1, 4, 7)))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


# Four channels by hand


class FourChannels(nn.Module):
    """One pixel x -> a_c x -> times gamma_c -> two logits that are equal, so that p = (1/2, 1/2).

    With delta_c = V_0c - V_1c and d_c = gamma_c a_c delta_c x, the loss at label 0 has g_c = -d_c / 2, and its curvature
    is 1/4 of the square of the gap between the logits: A = d d^T / 4 = G.
    """

    A, GAMMA, DELTA = [1.0, 1, 2, 3], [1.0, 2, -1, 1], [2.0, -1, -1, 0]
    D = torch.tensor([2.0, -2, 2, 0], dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(1, 4, 1, bias=False), nn.BatchNorm2d(4, eps=0.0), nn.Linear(4, 2)
        self.conv.weight.data.copy_(torch.tensor(self.A).view(4, 1, 1, 1))
        self.bn.weight.data.copy_(torch.tensor(self.GAMMA))
        self.head.weight.data.copy_(torch.tensor([self.DELTA, [0.0] * 4]))
        self.head.bias.data.copy_(torch.tensor([-2.0, 0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.conv(x)).flatten(1))


def by_hand(count: int = 2, **config) -> ScoringContext:
    net = FourChannels().eval().double()
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    x, labels = torch.ones(count, 1, 1, 1, dtype=torch.float64), torch.zeros(count, dtype=torch.long)
    config = CampHiVeConfig(**{"curvature_images": count, "num_eigenpairs": 1} | config)
    analysis = NetworkAnalysis(trace_network(net, (1, 1, 1)), state, frozenset())
    return ScoringContext(analysis, Calibration((x,), (labels,), (torch.arange(count),), count), config)


# |v| is |j| / ||j|| with j the gradient of the gap: gamma delta at the filters (2, -2, 1, 0), gamma a at the readers of
# either logit (1, 2, -2, 3 and their negatives): ||j||^2 = 9 + 2 * 18 = 45.
BY_HAND = {
    "hive": [1 / 2, 1 / 2, 1 / 2, 0],  # lambda = |d|^2 / 4 = 3, u = d / |d|: 3 / 2 * d^2 / 12
    "hive-paper": [2 / 45**0.5, 2 / 45**0.5, 1 / 45**0.5, 0],
    "hap": [1 / 2, 1 / 2, 1 / 2, 0],  # 1/2 * (gamma delta)^2 / 4 * a^2: for single weights, the same as hive's
    "sosp-h": [1 + 1 / 2, 1 + 1 / 2, 1 + 1 / 2, 0],  # |d| / 2 + |d_c * sum(d)| / 8 with sum(d) = 2
    "taylor": [1, 1, 1, 0],
    "magnitude": [4 / 1.5, 1 / 1.5, 1 / 1.5, 0],
    "bn-scale": [1, 2, 1, 1],
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("curvature", ["gauss-newton", "hessian"])
def test_four_channels_by_hand(name, curvature, exact):
    """The logits are linear in gates and equal, hence both matrices agree for gates; a filter and its reader are not."""
    if name == "hive-paper" and curvature == "hessian":
        pytest.skip("the Hessian in weight space has a term between each filter and its readers; see the dense test")
    found = SCORERS[name](by_hand(curvature=curvature))
    assert found.keys() == {"conv"}
    torch.testing.assert_close(found["conv"], torch.tensor(BY_HAND[name], dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_drawn_gradients_by_hand():
    """z = +-(1, -1) / sqrt 2 where the two signs differ, else 0: g^2 = d^2 / 2 for about half the images."""
    count, d = 400, FourChannels.D
    signs = torch.randint(0, 2, (count, 2), generator=torch.Generator().manual_seed(0))
    differ = float((signs[:, 0] != signs[:, 1]).double().mean())
    assert 0.4 < differ < 0.6
    torch.testing.assert_close(SCORERS["fisher"](by_hand(count))["conv"], d.square() * differ / 4)
    # G = differ / 2 * d d^T: the dead channel goes first, then 1 + differ, each earlier one adding 2 * differ
    steps = [1 + differ, 1 + 3 * differ, 1 + 5 * differ]
    found = SCORERS["sosp-i"](by_hand(count, threshold="global"))["conv"]
    torch.testing.assert_close(found[:3].sort().values, torch.tensor(steps, dtype=torch.float64), rtol=1e-6, atol=0)
    assert found[3] == 0


def test_random_by_hand():
    expected = torch.rand(4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    assert torch.equal(SCORERS["random"](by_hand(seed=5))["conv"], expected)


def test_the_greedy_choice_by_hand():
    """Alone 1.5, 2, 2.5, 3. After s0: 2 + 4, 2.5 + 0, 3 + 1; after s2: 6 + 1, 4 + 0; after s3: 7 + 1."""
    first = torch.tensor([1.0, 1, 2, 2], dtype=torch.float64)
    matrix = torch.tensor([[1.0, 4, 0, 1], [4, 2, 1, 1], [0, 1, 1, 0], [1, 1, 0, 2]])
    ones, everyone = torch.ones(4, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    alone, row = first + 0.5 * matrix.diagonal(), matrix.__getitem__
    assert greedy_marginals(alone, row, ones, everyone).tolist() == [1.5, 8, 2.5, 4]
    # where s0 costs a tenth of the others it goes last; where it is no candidate nothing counts for or against it
    costs = torch.tensor([0.1, 1, 1, 1], dtype=torch.float64)
    assert greedy_marginals(alone, row, costs, everyone).tolist() == [6.5, 2, 3.5, 4]
    assert greedy_marginals(alone, row, ones, everyone & (ones.cumsum(0) > 1)).tolist() == [1.5, 2, 3.5, 4]


def test_greedy_marginals_are_those_of_a_plain_search():
    """Against lambda itself, summed afresh for every set that is tried."""
    generator = torch.Generator().manual_seed(0)
    first, half = torch.rand(9, generator=generator, dtype=torch.float64), torch.rand(9, 9, generator=generator)
    matrix, costs = (half + half.T).double(), 1 + torch.rand(9, generator=generator, dtype=torch.float64)

    def value(chosen: list[int]) -> float:
        return float(first[chosen].sum() + 0.5 * matrix[chosen][:, chosen].sum())

    chosen: list[int] = []
    expected = torch.zeros(9, dtype=torch.float64)
    while len(chosen) < 9:
        gains = {s: value([*chosen, s]) - value(chosen) for s in range(9) if s not in chosen}
        best = min(gains, key=lambda s: gains[s] / costs[s])
        expected[best] = gains[best]
        chosen.append(best)
    alone = first + 0.5 * matrix.diagonal()
    found = greedy_marginals(alone, matrix.__getitem__, costs, torch.ones(9, dtype=torch.bool))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert (found / costs).argsort().tolist() == chosen


# Formulas against dense matrices


def dense_matrices(subject: ScoringContext) -> dict[str, Tensor]:
    """The loss's Hessian and Gauss-Newton matrix [P, P] in all conv and linear weights, mean over the images."""
    trace, state = subject.trace, subject.analysis.state
    x, labels = torch.cat(subject.calibration.images), torch.cat(subject.calibration.labels)
    weights = {name: state[name] for name in trace.positions}
    sizes = [weight.numel() for weight in weights.values()]

    def logits(flat: Tensor) -> Tensor:
        parts = {n: p.view(w.shape) for (n, w), p in zip(weights.items(), flat.split(sizes))}
        return trace.graph.run({**state, **parts}, x)[0]

    flat = torch.cat([weight.reshape(-1) for weight in weights.values()])
    p = logits(flat).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    jacobian = torch.func.jacrev(logits, chunk_size=16)(flat)
    hessian = torch.func.hessian(lambda flat: F.cross_entropy(logits(flat), labels))(flat)
    return {
        "hessian": hessian,
        "gauss-newton": torch.einsum("nka,nkl,nlb->ab", jacobian, inner, jacobian) / len(x),
    }


@pytest.fixture(scope="module")
def small() -> tuple[ScoringContext, dict[str, Tensor]]:
    subject = subject_for("hap")
    return subject, dense_matrices(subject)


def parts(subject: ScoringContext, values: Tensor) -> dict[str, Tensor]:
    sizes = [subject.analysis.state[name].numel() for name in subject.trace.positions]
    return {n: p.view(subject.analysis.state[n].shape) for n, p in zip(subject.trace.positions, values.split(sizes))}


def with_matrix(subject: ScoringContext, curvature: str) -> ScoringContext:
    return replace(subject, config=replace(subject.config, curvature=curvature))


def filters(subject: ScoringContext, values: Tensor) -> dict[str, Tensor]:
    """NormalEquations over the filters of SmallResNet's channels, spelled out: stem and conv2 write the same four."""
    v = {name: part.flatten(1).sum(1) for name, part in parts(subject, values).items()}
    return {"stem": v["stem.weight"] + v["block1.conv2.weight"], "block1.conv1": v["block1.conv1.weight"]}


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_weight_products_are_those_of_the_dense_matrix(small, curvature):
    subject, matrices = small
    v = torch.randn(len(matrices[curvature]), 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = second_order.weight_product(with_matrix(subject, curvature))(v)
    torch.testing.assert_close(found, matrices[curvature] @ v, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("curvature", first_by_default(["gauss-newton", "hessian"]))
def test_hap_is_the_trace_of_each_block_times_the_squared_norm_over_twice_the_size(small, curvature, exact):
    subject, matrices = small
    flat = torch.cat([subject.analysis.state[name].reshape(-1) for name in subject.trace.positions])
    traces, norms, sizes = (
        filters(subject, values) for values in (matrices[curvature].diagonal(), flat.square(), torch.ones_like(flat))
    )
    found = SCORERS["hap"](with_matrix(subject, curvature))
    assert sizes["stem"].tolist() == [3 + 5 * 9] * 2
    for name in found:
        expected = traces[name] * norms[name] / (2 * sizes[name])
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_hap_is_unbiased():
    """One pixel, twelve weights: the mean of many probes comes within their spread of what is worked out by hand."""
    found = SCORERS["hap"](by_hand(hutchinson_probes=600))["conv"]
    torch.testing.assert_close(found, torch.tensor(BY_HAND["hap"], dtype=torch.float64), rtol=0, atol=0.35)
    assert not torch.equal(found, SCORERS["hap"](by_hand(hutchinson_probes=600, seed=1))["conv"])


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_hive_paper_sums_the_dominant_eigenvector_over_filters(small, curvature):
    subject, matrices = small
    subject = replace(subject, config=replace(subject.config, power_steps=200, power_tolerance=1e-6))
    values, vectors = torch.linalg.eigh(matrices[curvature])
    expected = filters(subject, vectors[:, values.abs().argmax()].abs())
    found = SCORERS["hive-paper"](with_matrix(subject, curvature))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_sosp_h_is_the_papers_formula_in_weight_space(small, curvature):
    """|theta_s . dL| + 1/2 |theta_s^T H theta_struc|, with dense H and the structures spelled out as weight vectors."""
    subject, matrices = small
    trace, state = subject.trace, subject.analysis.state
    structures = []
    for group, readers in (
        ("stem", ["block1.conv1.weight", "head.weight"]),
        ("block1.conv1", ["block1.conv2.weight"]),
    ):
        size = next(g.size for g in trace.groups if g.name == group)
        for c in range(size):
            theta = {name: torch.zeros_like(state[name]) for name in trace.positions}
            for reader in readers:
                theta[reader][:, c] = state[reader][:, c]
            structures.append(torch.cat([part.reshape(-1) for part in theta.values()]))
    theta = torch.stack(structures)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        logits = trace.graph.run({**state, **weights}, torch.cat(subject.calibration.images))[0]
        return F.cross_entropy(logits, torch.cat(subject.calibration.labels))

    gradient = torch.func.grad(loss)({name: state[name] for name in trace.positions})
    first = theta @ torch.cat([part.reshape(-1) for part in gradient.values()])
    second = theta @ matrices[curvature] @ theta.sum(0)
    found = SCORERS["sosp-h"](with_matrix(subject, curvature))
    torch.testing.assert_close(joined(found), first.abs() + 0.5 * second.abs(), rtol=1e-9, atol=1e-11)


def test_sosp_is_matrix_averages_to_the_gauss_newton_matrix_of_the_gates(small):
    subject, _ = small
    gates = subject.gates
    x = torch.cat(subject.calibration.images)

    def logits(m: Tensor) -> Tensor:
        return subject.trace.graph.run({**subject.analysis.state, **lift(gates, subject.analysis.state, m)}, x)[0]

    ones = torch.ones(gates.size, dtype=x.dtype)
    jacobian, p = torch.func.jacrev(logits)(ones), logits(ones).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("nka,nkl,nlb->ab", jacobian, inner, jacobian) / len(x)
    many = 250
    repeated = replace(
        subject,
        calibration=Calibration(
            images=(x.repeat(many, 1, 1, 1),),
            labels=(torch.cat(subject.calibration.labels).repeat(many),),
            indices=(torch.arange(len(x) * many),),
            total=len(x) * many,
        ),
    )
    (gradients,) = repeated.model_gradients("")
    found = gradients.T @ gradients / repeated.total
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()
    g = joined(SCORERS["sosp-i"](repeated))
    first = torch.stack(list(repeated.label_gradients(""))).mean((0, 1)).abs()
    costs = torch.ones(gates.size, dtype=torch.float64)
    costs[gates.slices["block1.conv1"]] = 9 * (2 * 9 + 2 * 9)  # MACs that a channel saves, 3x3 pixels
    inside = torch.zeros(gates.size, dtype=torch.bool)
    inside[gates.slices["block1.conv1"]] = True
    alone = first + 0.5 * found.diagonal()
    expected = greedy_marginals(alone, found.abs().__getitem__, costs, inside)
    torch.testing.assert_close(g, expected, rtol=1e-5, atol=1e-9)


def test_sosp_i_is_greedy_per_mac_only_where_the_plan_is():
    """One channel of group b costs ten of a: alone they score the same, and the greedy order differs."""
    a, b = (SCORERS["sosp-i"](context(scope="all", threshold=threshold)) for threshold in ("adaptive", "global"))
    assert (joined(a) - joined(b)).abs().max() > 1e-3 * joined(b).max()
    assert joined(a).min() > 0


def test_fisher_averages_to_half_the_diagonal_of_the_gauss_newton_matrix():
    """E over labels of the model = sum_k p_k g_k^2, exactly; hive's eigenpairs, all of them, add up to it as well."""
    subject = context()
    gates = subject.gates
    x = torch.cat(subject.calibration.images)
    p = subject.trace.graph.run(subject.analysis.state, x)[0].softmax(1)
    gradients = [
        subject.network.gradients(x, lambda z, k=k: label_cotangent(z, torch.full((len(z),), k))) for k in range(3)
    ]
    expected = sum((p[:, k, None] * gradients[k].square()).sum(0) for k in range(3)) / len(x) / 2
    many = 60  # draws per image
    repeated = replace(
        subject,
        calibration=Calibration(
            images=(x.repeat(many, 1, 1, 1),),
            labels=(torch.zeros(len(x) * many, dtype=torch.long),),
            indices=(torch.arange(len(x) * many),),
            total=len(x) * many,
        ),
    )
    found = joined(SCORERS["fisher"](repeated))
    assert ((found - expected).abs() <= 0.15 * expected + 1e-7).all()
    whole = joined(SCORERS["hive"](context(num_eigenpairs=gates.size, power_steps=50, power_tolerance=1e-9)))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-8)


def test_taylor_is_the_mean_absolute_gate_gradient():
    subject = context()
    labels = torch.cat(subject.calibration.labels)
    gradients = subject.network.gradients(torch.cat(subject.calibration.images), lambda z: label_cotangent(z, labels))
    torch.testing.assert_close(joined(SCORERS["taylor"](subject)), gradients.abs().mean(0), rtol=1e-9, atol=1e-12)


def test_magnitude_is_the_squared_norm_of_what_consumers_read_over_its_mean():
    subject = context()
    squares = subject.analysis.state["block1.conv2.weight"].square().sum((0, 2, 3))
    torch.testing.assert_close(SCORERS["magnitude"](subject)["block1.conv1"], squares / squares.mean())


def test_hive_follows_the_config_to_the_hessian():
    gauss, hessian = (
        joined(SCORERS["hive"](context(curvature=c, num_eigenpairs=2))) for c in ("gauss-newton", "hessian")
    )
    assert (gauss - hessian).abs().max() > 1e-3 * gauss.max()


def test_random_depends_on_the_seed_alone():
    a, b, c = (joined(SCORERS["random"](context(seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
