"""What scores count by depth: by hand, and chosen by trials that are what they say they are."""

from dataclasses import replace

import pytest
import torch

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError
from hf_camphive.core.plan import ChannelGroup
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.pruning import trials
from hf_camphive.pruning.merging.rules import merge
from hf_camphive.pruning.merging.task import MergeTask
from hf_camphive.pruning.scoring.depth_weighting import best_early_weight, weighed
from hf_camphive.runs.pruner import CampHiVePruner
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.data.loaders import DataOptions, load_loaders

CONFIG = CampHiVeConfig(calibration_size=128, num_train_epochs=0, polish_steps=0, mixed_precision="no")


def groups(*names: str) -> list[ChannelGroup]:
    return [ChannelGroup(name, 2, ()) for name in names]


def test_weights_by_hand():
    scores = {"middle": torch.tensor([3.0, 5.0]), "last": torch.tensor([7.0, 1.0]), "first": torch.tensor([1.0, 2.0])}
    found = weighed(scores, groups("first", "middle", "last"), 1 / 4)
    assert {name: values.tolist() for name, values in found.items()} == {
        "first": [0.25, 0.5],
        "middle": [1.5, 2.5],  # sqrt(1/4)
        "last": [7.0, 1.0],
    }
    assert weighed({"only": torch.ones(2)}, groups("only"), 1 / 4)["only"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize(
    ("losses", "best", "asked"),
    [
        ({1: 10.0, 1 / 4: 9.1}, 1, 2),  # less than a tenth
        ({1: 10.0, 1 / 4: 9.0, 1 / 16: 8.2}, 1 / 4, 3),
        ({1: 10.0, 1 / 4: 8.0, 1 / 16: 7.0}, 1 / 16, 3),
        ({1: 10.0, 1 / 4: float("nan")}, 1, 2),
    ],
)
def test_the_first_that_brings_too_little_ends_the_search(losses, best, asked):
    tried = []

    def loss(weight: float) -> float:
        tried.append(weight)
        return losses[weight]

    assert best_early_weight(loss) == best
    assert len(tried) == asked


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    net = CampHiVePruner("digits_resnet", CONFIG).net
    return Calibration.collect(load_loaders("digits", net, CONFIG, DataOptions(workers=0)).calibration)


def test_a_trial_is_a_plan_merged_and_cut_and_judged_by_images_it_has_not_seen(monkeypatch, calibration):
    pruner = CampHiVePruner("digits_resnet", CONFIG)
    losses = {}

    def search(loss) -> float:
        losses.update({weight: loss(weight) for weight in (1.0, 0.01)})
        return 0.01

    monkeypatch.setattr(trials, "best_early_weight", search)
    plan = pruner.plan(calibration)
    for weight, loss in losses.items():
        told = CampHiVePruner("digits_resnet", replace(CONFIG, early_weight=weight))
        same = told.cycle.plan(calibration, scores=pruner.scores)
        assert (same == plan) == (weight == 0.01)
        fitted, judges = calibration.split(8)
        analysis = told.cycle.analysis
        state = merge(MergeTask(analysis.state, same, analysis.trace, fitted.split(4)[1].images, CONFIG.ridge))
        net = apply_plan(told.net, same, analysis.trace, state)
        with torch.no_grad():
            errors = torch.cat([net(images) - told.dense(images) for images in judges.images])
        assert loss == pytest.approx(float(errors.norm(dim=1).mean()), rel=1e-4)
    assert losses[1.0] != losses[0.01]
    (note,) = [note for note in pruner.log.notes if "weighted by 0.01" in note]
    assert "16 calibration images" in note


@pytest.mark.parametrize(
    ("options", "tries"),
    [
        ({}, True),
        ({"target_latency": 0.5}, True),
        ({"criterion": "merge-joint"}, True),
        ({"criterion": "fisher"}, False),
        ({"merge": "lstsq"}, False),
        ({"threshold": "percentile"}, False),
        ({"early_weight": 1.0}, False),
    ],
    ids=str,
)
def test_trials_are_made_where_they_can_matter(options, tries):
    assert CampHiVeConfig(**options).tries_early_weights == tries


def test_too_few_images_leave_none_to_judge(monkeypatch):
    monkeypatch.setattr(trials, "best_early_weight", lambda loss: pytest.fail("there is nothing to judge by"))
    images = torch.randn(127, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    few = Calibration.collect([{"pixel_values": images, "labels": torch.zeros(127, dtype=torch.long)}])
    pruner = CampHiVePruner("digits_resnet", CONFIG)
    assert pruner.plan(few).cuts


@pytest.mark.parametrize("weight", [0.0, -1.0, 1.5])
def test_weights_that_make_no_sense_are_refused(weight):
    with pytest.raises(ConfigError, match=f"early_weight is {weight}; it is a share"):
        CampHiVeConfig(early_weight=weight)
