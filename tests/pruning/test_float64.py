"""Everything that sums in float64 works on a device that has none, and finds what it finds on the CPU."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.no_float64 import DEVICE, imitated, there
from support.plans import plan_with
from support.polishing import calibration, held_out
from support.scoring import context, with_state
from support.toys import ToyResNet, images, randomise

from hf_camphive.core import runtime as launch
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError
from hf_camphive.core.methods import MERGE_RULES
from hf_camphive.core.runtime import float64_device, to_float64
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.network.surgery.verification import check_groups
from hf_camphive.network.surgery.widening import expand
from hf_camphive.pruning.merging.rules import merge, with_pairs
from hf_camphive.pruning.merging.task import MergeTask
from hf_camphive.pruning.merging.weights import merge_weights
from hf_camphive.pruning.polish import PolishOptions, polish
from hf_camphive.pruning.scoring.criteria import SCORERS
from hf_camphive.pruning.trials import distance
from hf_camphive.training.data.calibration import Calibration

FUNCTIONAL = (
    "hive-paper",
    "hap",
    "sosp-h",
)  # differentiate with torch.func; they sum in the classes that the others do


def network():
    net = randomise(ToyResNet()).float()
    trace = trace_network(net, (3, 8, 8))
    return net, trace, {name: tensor.detach() for name, tensor in named_tensors(net).items()}


def test_the_imitated_device_refuses_what_such_a_device_refuses():
    with imitated():
        x = torch.ones(2, device=DEVICE)
        assert x.device == DEVICE and (x + 1).cpu().tolist() == [2, 2]
        for wrong in (
            lambda: x.double(),
            lambda: x.new_zeros(1, dtype=torch.float64),
            lambda: there(x.cpu().double()),
        ):
            with pytest.raises(TypeError, match="no float64"):
                wrong()
        with pytest.raises(RuntimeError, match="on one device"):
            x + torch.ones(2)


def test_float64_is_kept_on_the_device_that_has_it_and_else_on_the_cpu():
    assert float64_device(torch.device("cpu")) == torch.device("cpu")
    assert to_float64(torch.ones(2)).dtype == torch.float64
    with imitated():
        assert float64_device(DEVICE) == torch.device("cpu")
        assert to_float64(torch.ones(2, device=DEVICE)).tolist() == [1, 1]


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_merging(rule):
    _, trace, state = network()
    scores = {group.name: torch.rand(group.size, generator=torch.Generator().manual_seed(1)) for group in trace.groups}
    plan = plan_with(trace, {"block1.conv1": (0, 2, 3), "block2.conv1": (1, 2, 3, 4)})
    plan = with_pairs(replace(plan, merge=rule), scores)
    batches = [images(6).float(), images(5, seed=1).float()]
    expected = merge(MergeTask(state, plan, trace, batches))
    with imitated():
        found = merge(MergeTask(there(state), plan, trace, there(batches)))
        assert all(torch.equal(tensor.cpu(), expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("name", sorted(SCORERS.keys() - set(FUNCTIONAL)))
def test_criteria(name):
    subject = context()
    given, images = subject.analysis.state, subject.calibration.images
    state = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in given.items()}
    calibration = replace(subject.calibration, images=tuple(batch.float() for batch in images))
    subject = replace(with_state(subject, state), calibration=calibration)
    expected = SCORERS[name](subject)
    with imitated():
        placed = {key: there(getattr(calibration, key)) for key in ("images", "labels", "indices")}
        moved = replace(with_state(subject, there(state)), calibration=replace(calibration, **placed))
        found = SCORERS[name](moved)
        assert found.keys() == expected.keys()
        for group, values in found.items():
            torch.testing.assert_close(
                values.cpu(), expected[group], rtol=1e-3, atol=1e-4 * float(expected[group].max())
            )


def test_checking_groups():
    net, trace, _ = network()
    wrong = replace(
        trace,
        groups=(*trace.groups[:1], replace(trace.groups[1], slots=trace.groups[1].slots[:-1]), *trace.groups[2:]),
    )
    expected = check_groups(net, wrong, torch.Generator().manual_seed(0)).groups
    assert sum(g.frozen is not None for g in expected) == 2
    with imitated():
        net.to(DEVICE)
        assert check_groups(net, wrong, torch.Generator().manual_seed(0)).groups == expected
        assert next(net.parameters()).device == DEVICE


def test_judging_trials():
    net, _, _ = network()
    batches, targets = [images(4).float(), images(3, seed=1).float()], [torch.ones(4, 3), torch.zeros(3, 3)]
    with torch.no_grad():
        logits = torch.cat([net(batch).double() for batch in batches]) - torch.cat(targets)
        with imitated():
            found = distance(net.to(DEVICE), there(batches), there(targets))
    torch.testing.assert_close(found, logits.norm(dim=1).sum()[None], rtol=1e-6, atol=0)


def test_sums_over_several_such_devices_are_refused(monkeypatch):
    monkeypatch.setattr(launch, "Accelerator", lambda **_: SimpleNamespace(num_processes=2, device=DEVICE))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        imitated(),
        pytest.raises(ConfigError, match=r"2 processes on lazy, which has no float64.*launch one process"),
    ):
        launch.make_accelerator(CampHiVeConfig())


def test_polishing():
    dense, net = network()[0], network()[0]
    net.head.weight.data *= 1.5
    some = [
        Calibration(tuple(x.float() for x in each.images), *each_rest(each)) for each in (calibration(), held_out())
    ]
    expected = polish(copied := copy.deepcopy(net), dense, *some, PolishOptions(6))
    assert expected.weights
    with imitated():
        net.to(DEVICE), dense.to(DEVICE)
        some = [Calibration(there(each.images), *each_rest(each)) for each in some]
        assert polish(net, dense, *some, PolishOptions(6)) == expected
        torch.testing.assert_close(net.head.weight.detach().cpu(), copied.head.weight.detach(), rtol=1e-4, atol=1e-5)


def each_rest(each: Calibration) -> tuple:
    return each.labels, each.indices, each.total


def test_widening():
    net, trace, _ = network()
    expected, _ = expand(net, trace, 1.5)
    with imitated():
        found, _ = expand(net.to(DEVICE), trace, 1.5)
        assert all(
            torch.equal(tensor.cpu(), expected.state_dict()[name]) for name, tensor in found.state_dict().items()
        )


def test_merging_single_weights():
    weight, scores = torch.randn(6, 5), torch.rand(6, 5, dtype=torch.float64)
    expected = merge_weights(weight, scores, 0.5, 0.5)
    with imitated():
        found = merge_weights(there(weight), scores, 0.5, 0.5)
        assert found.device == DEVICE and torch.equal(found.cpu(), expected)
