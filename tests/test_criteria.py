"""Each criterion against its formula, and the laws that all of them keep."""

from dataclasses import replace

import pytest
import torch
from toys import ToyResNet, images, randomise

from hf_camphive.config import CampHiVeConfig
from hf_camphive.criteria import CRITERIA, Evidence
from hf_camphive.curvature import label_cotangent
from hf_camphive.gates import gate_gradients, gate_space
from hf_camphive.graph import named_tensors
from hf_camphive.tracing import trace_network


def evidence(net=None, count: int = 12, batches: tuple[int, ...] = (5, 7), **config) -> Evidence:
    torch.manual_seed(0)
    net = randomise(net or ToyResNet())
    trace = trace_network(net, (3, 8, 8))
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    x, labels = images(count), torch.arange(count) % 3
    return Evidence(
        trace,
        state,
        x.split(batches),
        labels.split(batches),
        torch.arange(count).split(batches),
        count,
        CampHiVeConfig(calibration_size=16, curvature_images=count, **config),
    )


def joined(scores) -> torch.Tensor:
    return torch.cat(list(scores.values()))


@pytest.mark.parametrize("name", CRITERIA)
def test_scores_have_one_finite_number_a_channel_of_every_free_group(name):
    found = CRITERIA[name](evidence())
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "stem": (6,),
        "block1.conv1": (5,),
        "block2.conv1": (7,),
        "block2.conv2": (8,),
    }
    assert joined(found).isfinite().all() and (joined(found) >= -1e-12).all()
    assert joined(found).unique().numel() > 20


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_permuting_channels_permutes_scores(name):
    subject = evidence()
    order = torch.tensor([3, 0, 4, 1, 2])
    state = dict(subject.state)
    for slot in next(g for g in subject.trace.groups if g.name == "block1.conv1").slots:
        state[slot.tensor] = state[slot.tensor].index_select(slot.axis, order)
    before, after = CRITERIA[name](subject), CRITERIA[name](replace(subject, state=state))
    torch.testing.assert_close(after["block1.conv1"], before["block1.conv1"][order], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(after["stem"], before["stem"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in CRITERIA if name != "random"])
def test_a_channel_that_nobody_reads_scores_zero(name):
    subject = evidence()
    state = dict(subject.state)
    state["block1.conv2.weight"] = state["block1.conv2.weight"].clone().index_fill_(1, torch.tensor([2]), 0)
    scores = CRITERIA[name](replace(subject, state=state))["block1.conv1"]
    assert scores[2].abs() < 1e-12 and (scores[[0, 1, 3, 4]] > 1e-9).all()


@pytest.mark.parametrize("name", ["fisher", "taylor", "hive"])
def test_batches_do_not_matter(name):
    a, b = (joined(CRITERIA[name](evidence(batches=batches))) for batches in ((12,), (1, 4, 7)))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-10)


def test_fisher_averages_to_half_the_diagonal_of_the_gauss_newton_matrix():
    """E over labels of the model = sum_k p_k g_k^2, exactly; hive's eigenpairs, all of them, add up to it as well."""
    subject = evidence()
    gates = gate_space(subject.trace, subject.state)
    x = torch.cat(subject.images)
    p = subject.trace.graph.run(subject.state, x)[0].softmax(1)
    gradients = [
        gate_gradients(
            subject.trace, subject.state, gates, x, lambda z, k=k: label_cotangent(z, torch.full((len(z),), k))
        )
        for k in range(3)
    ]
    expected = sum((p[:, k, None] * gradients[k].square()).sum(0) for k in range(3)) / len(x) / 2
    many = 60  # draws per image
    repeated = replace(
        subject,
        images=(x.repeat(many, 1, 1, 1),),
        labels=(torch.zeros(len(x) * many, dtype=torch.long),),
        indices=(torch.arange(len(x) * many),),
        total=len(x) * many,
    )
    found = joined(CRITERIA["fisher"](repeated))
    assert ((found - expected).abs() <= 0.15 * expected + 1e-7).all()
    whole = joined(CRITERIA["hive"](evidence(num_eigenpairs=gates.size, power_steps=50, power_tolerance=1e-9)))
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-8)


def test_taylor_is_the_mean_absolute_gate_gradient():
    subject = evidence()
    gates = gate_space(subject.trace, subject.state)
    labels = torch.cat(subject.labels)
    gradients = gate_gradients(
        subject.trace, subject.state, gates, torch.cat(subject.images), lambda z: label_cotangent(z, labels)
    )
    torch.testing.assert_close(joined(CRITERIA["taylor"](subject)), gradients.abs().mean(0), rtol=1e-9, atol=1e-12)


def test_magnitude_is_the_squared_norm_of_what_consumers_read_over_its_mean():
    subject = evidence()
    squares = subject.state["block1.conv2.weight"].square().sum((0, 2, 3))
    torch.testing.assert_close(CRITERIA["magnitude"](subject)["block1.conv1"], squares / squares.mean())


def test_hive_follows_the_config_to_the_hessian():
    gauss, hessian = (
        joined(CRITERIA["hive"](evidence(curvature=c, num_eigenpairs=2))) for c in ("gauss-newton", "hessian")
    )
    assert (gauss - hessian).abs().max() > 1e-3 * gauss.max()


def test_random_depends_on_the_seed_alone():
    a, b, c = (joined(CRITERIA["random"](evidence(seed=seed))) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
