"""Single weights: the merge against a reference in numpy, zeros that training cannot move, a report that promises nothing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.brief import time_briefly
from support.runs import KILLS, Killed, digits, kill_after, pruned
from support.scoring import subject_for
from support.training import CONFIG as TRAINING
from support.training import Net, interrupted, loaders

import hf_camphive
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.hub.loading import load_base
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.pruning.merging.weights import merge_weights, zero_share, zero_weights
from hf_camphive.pruning.scoring.weight_space import dominant_eigenvector
from hf_camphive.runs import cycle
from hf_camphive.runs.pruner import CampHiVePruner
from hf_camphive.training.finetuning import finetune


def reference(weight: np.ndarray, scores: np.ndarray, sparsity: float, coefficient: float) -> np.ndarray:
    flat, rank = weight.flatten(), np.argsort(-scores.flatten(), kind="stable")
    kept, removed = np.split(rank, [flat.size - min(int(sparsity * flat.size), flat.size - 1)])
    for r, source in enumerate(removed):
        flat[kept[r % len(kept)]] += coefficient * weight.flatten()[source]
        flat[source] = 0
    return flat.reshape(weight.shape)


def test_the_merge_by_hand():
    weight = torch.tensor([[1.0, -2.0], [4.0, 8.0]])
    scores = torch.tensor([[0.9, 0.1], [0.4, 0.8]])
    assert merge_weights(weight, scores, 0.5, 0.5).tolist() == [[1 + 2, 0], [0, 8 - 1]]  # 4 -> 1, then -2 -> 8
    assert merge_weights(weight, scores, 0.75, 0.5).tolist() == [[1 + 4 + 2 - 1, 0], [0, 0]]
    assert merge_weights(weight, scores, 0.5, 0.0).tolist() == [[1, 0], [0, 8]]


@pytest.mark.parametrize("shape", [(7,), (4, 5), (3, 2, 3, 3)])
@pytest.mark.parametrize("sparsity", [0.01, 0.3, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("ties", [False, True])
def test_the_merge_is_that_of_the_reference(shape, sparsity, ties):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = torch.rand(shape, generator=generator)
    scores = (4 * scores).round() if ties else scores
    expected = reference(weight.numpy(), scores.numpy(), sparsity, 0.5)
    np.testing.assert_allclose(merge_weights(weight, scores, sparsity, 0.5), expected, rtol=1e-12, atol=1e-15)


def test_each_tensor_loses_its_least_curved_weights():
    subject = subject_for("hive-paper")
    subject = replace(
        subject, config=CampHiVeConfig.from_preset("camphive-paper-weights", sparsity=0.3, power_steps=3)
    )
    found, v = zero_weights(subject), dominant_eigenvector(subject)
    assert found.keys() == {"stem.weight", "block1.conv1.weight", "block1.conv2.weight", "head.weight"}
    for name, weight in found.items():
        expected = reference(subject.analysis.state[name].numpy(), v[name].abs().numpy(), 0.3, 0.5)
        np.testing.assert_allclose(weight, expected, rtol=1e-12)
        assert int((weight == 0).sum()) == int(0.3 * weight.numel())


# Finetuning


SPARSE = replace(
    TRAINING, granularity="weight", criterion="hive-paper", merge="cyclic", weight_decay=0.1, learning_rate=0.02
)


def sparse_net() -> Net:
    net = Net()
    with torch.no_grad():
        for weight in (net.conv.weight, net.fc.weight):
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5)
    return net


def check_zeros(net, before) -> None:
    for name in ("conv.weight", "fc.weight"):
        weight, zero = net.get_parameter(name).detach(), before.get_parameter(name) == 0
        assert torch.equal(weight == 0, zero) and 0.4 < zero.double().mean() < 0.6
        assert not weight[zero].signbit().any()  # +0.0 to the bit
        assert (weight != before.get_parameter(name))[~zero].all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_zeros_survive_finetuning_bit_for_bit(accelerator, optimizer):
    net = sparse_net()
    finetune(net, loaders(), replace(SPARSE, optimizer=optimizer), accelerator)
    check_zeros(net, sparse_net())
    grown = sparse_net()
    finetune(grown, loaders(), replace(TRAINING, optimizer=optimizer), accelerator)  # nothing holds them back here
    assert (grown.fc.weight != 0).all()


def test_zeros_survive_a_resumed_finetuning(accelerator, tmp_path, monkeypatch):
    whole, net = sparse_net(), Net()
    finetune(whole, loaders(jitter=True), SPARSE, accelerator, Net())
    interrupted(sparse_net(), SPARSE, accelerator, tmp_path, 1, monkeypatch)
    finetune(net, loaders(jitter=True), SPARSE, accelerator, Net(), tmp_path, resume=True)
    check_zeros(net, sparse_net())
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), whole.parameters()))


# Whole runs


WEIGHTS = CampHiVeConfig.from_preset(
    "camphive-paper-weights",
    **{"calibration_size": 64, "curvature_images": 16, "power_steps": 2, "mixed_precision": "no"},
    **{"num_train_epochs": 1, "sparsity": 0.4},
)


@pytest.fixture(autouse=True)
def brief_latency(monkeypatch):
    time_briefly(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        time_briefly(patch)
        job = pruned(WEIGHTS)
        return job, job.save_pretrained(tmp_path_factory.mktemp("weights") / "saved")


def test_a_run_on_weights_saves_zeros_and_promises_nothing(finished):
    job, folder = finished
    report, dense = job.report, load_base("digits_resnet").net
    names = [name for name, p in dense.named_parameters() if p.ndim > 1]
    assert [stage.name for stage in report.stages] == ["dense", "pruned", "finetuned"]
    assert len({(stage.footprint.macs, stage.footprint.parameters) for stage in report.stages}) == 1
    net = hf_camphive.from_pretrained(folder).timm_model
    for name in names:
        weight = net.get_parameter(name)
        assert int((weight == 0).sum()) == int(0.4 * weight.numel()), name
        assert weight.shape == dense.get_parameter(name).shape
    assert zero_share(net, names) == pytest.approx(0.4, abs=1e-3) and zero_share(dense, names) == 0
    assert f"40.0% of the weights of {len(names)} convolutions and linear layers are zero" in report.notes[0]
    card = (folder / "README.md").read_text()
    assert "no smaller and no faster" in card and "zeros save neither MACs nor time" in card
    assert all(row.kept == row.size for row in report.groups)
    assert job.plans[0].macs_after == job.plans[0].macs_before and not job.plans[0].cuts
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), job.net.state_dict().values()))


@pytest.mark.slow
def test_a_killed_run_on_weights_keeps_its_zeros(finished, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, *KILLS["before finetuning"][:2], 2)
        with pytest.raises(Killed):
            pruned(WEIGHTS, work_dir=tmp_path / "work")
    monkeypatch.setattr(cycle, "zero_weights", lambda *_: pytest.fail("scored again"))
    job = pruned(WEIGHTS, work_dir=tmp_path / "work", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(job.net.state_dict().values(), finished[0].net.state_dict().values()))
    assert job.report.notes == finished[0].report.notes


def test_merging_weights_differs_from_zeroing_them():
    config = replace(WEIGHTS, num_train_epochs=0)
    nets = []
    for rule in ("cyclic", "none"):
        job = CampHiVePruner("digits_resnet", replace(config, merge=rule))
        calibration = digits(job.base.net, config).calibration
        job.apply(job.plan(calibration), calibration)
        nets.append(named_tensors(job.net)["conv1.weight"])
    dense = load_base("digits_resnet").net.conv1.weight
    assert torch.equal(nets[0] == 0, nets[1] == 0) and not torch.equal(nets[0], nets[1])
    assert torch.equal(nets[1], dense * (nets[1] != 0))
