"""Whole runs on the bundled network: what a report says is true, chance is seeded, and a kill changes nothing."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from accelerate.utils import gather_object
from PIL import Image
from support.brief import measure_briefly, time_briefly
from support.runs import CONFIG, KILLS, Killed, digits, kill_after, pruned
from support.tiers import first_by_default, slow_ones
from torch import nn

import hf_camphive
from hf_camphive.core import runtime as launch
from hf_camphive.core.config import CampHiVeConfig, choices
from hf_camphive.core.errors import ConfigError, DataError, ModelError, OutputError, PlanError
from hf_camphive.core.measures import Latency
from hf_camphive.core.methods import MERGE_RULES
from hf_camphive.core.plan import PLAN_FILE, ChannelCut, plans_from_json
from hf_camphive.core.runtime import Workers
from hf_camphive.hub import saving
from hf_camphive.hub.loading import load_base
from hf_camphive.hub.report import REPORT_FILE, PruneReport
from hf_camphive.network.footprint import count_macs, count_parameters
from hf_camphive.pruning import tuning
from hf_camphive.pruning.polish import Polished
from hf_camphive.pruning.scoring.criteria import SCORERS
from hf_camphive.runs import cycle, pruner
from hf_camphive.runs.progress import IterationCheckpoint, load_progress, run_identity
from hf_camphive.runs.pruner import CampHiVePruner
from hf_camphive.training.data.loaders import DataOptions, load_loaders
from hf_camphive.training.evaluation import evaluate_accuracy


@pytest.fixture(autouse=True)
def brief_latency(monkeypatch):
    time_briefly(monkeypatch)


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> tuple[CampHiVePruner, Path]:
    with pytest.MonkeyPatch.context() as patch:
        time_briefly(patch)
        job = pruned(replace(CONFIG, num_train_epochs=1), command="camphive prune")
        return job, job.save_pretrained(tmp_path_factory.mktemp("pruner") / "saved")


def test_the_report_is_true(finetuned):
    job, folder = finetuned
    report = PruneReport.from_json((folder / REPORT_FILE).read_text())
    assert report == job.report
    assert [stage.name for stage in report.stages] == ["dense", "pruned", "finetuned"]
    assert report.tuning == tuning.as_dict()
    dense, _, final = report.stages
    net = hf_camphive.from_pretrained(folder).timm_model
    loader, split = digits(net).evaluation
    assert evaluate_accuracy(net, loader, job.accelerator, split) == final.accuracy
    before = load_base("digits_resnet").net
    assert evaluate_accuracy(before, loader, job.accelerator, split) == dense.accuracy
    for stage, network in ((dense, before), (final, net)):
        assert stage.footprint.macs == count_macs(network, (3, 16, 16))
        assert stage.footprint.parameters == count_parameters(network)
    (plan,) = job.plans
    assert (plan.macs_before, plan.macs_after) == (dense.footprint.macs, final.footprint.macs)
    assert 0.48 < plan.macs_after / plan.macs_before <= 0.5
    assert (folder / "model.safetensors").stat().st_size == pytest.approx(final.footprint.file_bytes, rel=0.02)
    assert report.finetune["steps"] == 2 and len(report.finetune["epochs"]) == 1
    assert dict(report.rows) == {"calibration": 64, "train": 256, "validation": 100, "test": 100}
    assert final.accuracy.images == 100 and split == "100 of 300 rows of test"
    for row in report.groups:
        shape = dict(net.named_parameters()).get(f"{row.name}.weight")
        assert row.kept == (0 if shape is None else len(shape)), row
    spared = {row.name for row in report.groups if not row.in_scope}
    assert "conv1" in spared and not spared & {cut.group for cut in plan.cuts}
    assert report.command == "camphive prune" and report.config == json.loads(json.dumps(job.config.as_run()))


def test_the_saved_network_is_the_one_in_memory(finetuned):
    job, folder = finetuned
    assert same_weights(load_base(str(folder)).net, job.net)
    assert plans_from_json((folder / PLAN_FILE).read_text()) == tuple(job.plans)
    assert CampHiVeConfig.from_pretrained(folder) == job.config
    images = next(iter(digits(job.base.net).calibration))["pixel_values"]
    with torch.no_grad():
        logits = hf_camphive.from_pretrained(folder)(images).logits
        assert torch.allclose(logits, job.net(images), atol=1e-5)


@pytest.mark.slow
def test_finetuning_starts_from_the_pruned_network(finetuned):
    job, _ = finetuned
    assert not same_weights(pruned().net, job.net)
    assert pruned().plans == job.plans


@pytest.mark.parametrize("changes", first_by_default([{"num_train_epochs": 1}, {}, {"criterion": "random"}]), ids=str)
def test_the_same_seed_gives_the_same_network(changes):
    config = replace(CONFIG, **changes)
    first = pruned(config)
    torch.manual_seed(12345)  # what others drew before must not matter
    np.random.seed(54321)
    second = pruned(config)
    assert first.plans == second.plans
    assert same_weights(first.net, second.net)


@pytest.mark.slow
def test_another_seed_gives_another_plan():
    config = replace(CONFIG, criterion="random", merge="none")
    assert pruned(config).plans != pruned(replace(config, seed=1)).plans


@pytest.mark.slow
def test_polishing_is_a_stage_of_its_own(tmp_path, monkeypatch):
    config = replace(CONFIG, polish_steps=20, target_macs=0.3, merge="none")
    whole = pruned(config)
    assert [stage.name for stage in whole.report.stages] == ["dense", "pruned", "polished"]
    assert any("the way of 20 gradient steps" in note for note in whole.report.notes)
    rough = pruned(replace(config, polish_steps=0))
    assert rough.plans[0].cuts == whole.plans[0].cuts
    images = torch.cat([batch["pixel_values"] for batch in digits(whole.base.net).evaluation[0]])
    with torch.no_grad():
        errors = [(job.net(images) - whole.dense(images)).square().mean() for job in (whole, rough)]
    assert errors[0] < 0.9 * errors[1]
    with monkeypatch.context() as patch:
        patch.setattr(cycle, "polish", lambda *a, **k: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            pruned(config, work_dir=tmp_path / "work")
    resumed = pruned(config, work_dir=tmp_path / "work", resume=True)
    assert same_weights(resumed.net, whole.net) and resumed.stages == whole.stages


@pytest.mark.slow
def test_polishing_in_bf16_is_reported(monkeypatch):
    asked = []

    def remember(net, dense, fitted, held_out, options, **others):
        asked.append(options.precision)
        return Polished(weights=0.5)

    monkeypatch.setattr(cycle, "polish", remember)
    config = replace(CONFIG, criterion="magnitude", merge="none", polish_steps=20)
    notes = [pruned(replace(config, mixed_precision=precision)).log.notes[-1] for precision in ("auto", "bf16")]
    assert asked == ["no", "bf16"]
    assert notes[0].startswith("Polished without labels: the weights moved 50%")
    assert notes[1].startswith("Polished without labels, in bf16: the weights moved 50%")


def test_too_few_images_to_judge_by_leave_the_network_unpolished():
    config = replace(CONFIG, criterion="magnitude", merge="none", polish_steps=20, calibration_size=7)
    job = pruned(config)
    assert "Not polished: of fewer than 8 calibration images, none can be held out." in job.log.notes
    assert job.stages["polished"] == job.stages["pruned"]


@pytest.mark.slow
def test_cycles_meet_the_same_budget():
    job = pruned(replace(CONFIG, cycles=3))
    shares = [plan.macs_after / job.plans[0].macs_before for plan in job.plans]
    for share, asked in zip(shares, (0.5 ** (1 / 3), 0.5 ** (2 / 3), 0.5), strict=True):
        assert asked - 0.02 < share <= asked + 1e-3
    assert shares[-1] <= 0.5
    assert [plan.macs_before for plan in job.plans[1:]] == [plan.macs_after for plan in job.plans[:-1]]
    assert count_macs(job.net, (3, 16, 16)) == job.plans[-1].macs_after


@pytest.mark.slow
def test_a_budget_in_macs_is_that_many():
    job = pruned(replace(CONFIG, target_macs=6_000_000, criterion="magnitude", merge="none"))
    assert 5_800_000 < job.plans[-1].macs_after <= 6_000_000


@pytest.mark.slow
def test_cycles_that_overshoot_leave_the_rest_less_to_do():
    # Steps of 64 channels empty a branch of the last stage at once, which saves more than a cycle's share.
    config = replace(CONFIG, cycles=12, round_to=64, scope="interior", criterion="magnitude", merge="none")
    job = pruned(config)
    assert 1 < len(job.plans) <= 12
    assert job.plans[-1].macs_after <= 0.5 * job.plans[0].macs_before
    assert job.report.stages[-1].footprint.macs == job.plans[-1].macs_after


@pytest.mark.slow
def test_a_group_that_loses_its_first_layer_keeps_its_row(tmp_path):
    # layer2.0.conv2 names the stream of layer2; once that branch is gone, the stream goes by the name of its shortcut.
    config = replace(CONFIG, scope="all", cycles=2, criterion="magnitude", merge="none")
    job = CampHiVePruner("digits_resnet", config)
    calibration = digits_calibration()
    plan = job.plan(calibration)
    inner, stream = "layer2.0.conv1", "layer2.0.conv2"
    cuts = {cut.group: cut for cut in plan.cuts} | {inner: ChannelCut(inner, ())}
    job.apply(replace(plan, cuts=tuple(cuts.values()), dropped=("layer2.0",)), calibration)
    job.apply(job.plan(calibration), calibration)
    assert stream not in job.plans[1].keep
    job.save_pretrained(tmp_path / "small")
    report = PruneReport.from_json((tmp_path / "small" / REPORT_FILE).read_text())
    rows = {row.name: row for row in report.groups}
    assert rows[inner].kept == 0
    assert rows[stream].kept == len(job.net.layer2[1].conv2.weight) > 0


@pytest.mark.parametrize("criterion", SCORERS)
def test_every_criterion_prunes(criterion):
    config = replace(CONFIG, criterion=criterion, merge="none", num_eigenpairs=1, power_steps=1, hutchinson_probes=2)
    job = CampHiVePruner("digits_resnet", config)
    calibration = digits(job.base.net, config).calibration
    job.apply(job.plan(calibration), calibration)
    assert job.plans[0].criterion == criterion
    assert job.scores.keys() >= {cut.group for cut in job.plans[0].cuts}
    assert count_macs(job.net, (3, 16, 16)) == job.plans[0].macs_after


@pytest.mark.parametrize("merge", slow_ones(MERGE_RULES, set(MERGE_RULES) - {"reconstruct"}))
def test_every_merge_rule_prunes(merge):
    job = pruned(replace(CONFIG, merge=merge, target_macs=0.7))
    assert bool(job.plans[0].cuts[0].pairs) == MERGE_RULES[merge].pairs
    assert job.stages["pruned"].top1 > 0.3  # chance is 0.1


def test_every_criterion_and_rule_of_the_config_exists():
    assert choices("criterion") == ("auto", *SCORERS)
    assert choices("merge") == tuple(MERGE_RULES)


def test_the_given_network_is_never_changed():
    net = load_base("digits_resnet").net
    before = copy.deepcopy(net)
    job = pruned(replace(CONFIG, num_train_epochs=1), model=net)
    assert same_weights(net, before) and not net.training
    assert net.conv1.weight.is_contiguous() and job.dense is not net  # not even its memory layout
    assert all(parameter.grad is None for parameter in net.parameters())
    assert same_weights(job.dense, before)
    assert job.report.model_id == "digits_resnet"


def test_plan_touches_no_weight_and_apply_follows_it():
    job = CampHiVePruner("digits_resnet", CONFIG)
    before = copy.deepcopy(job.net)
    plan = job.plan(digits(job.base.net).calibration)
    assert same_weights(job.net, before) and job.plans == []
    again = plans_from_json(json.dumps({"schema": 1, "cycles": [plan.to_dict()]}))[0]
    net = job.apply(again, digits(job.base.net).calibration)
    assert net is job.net and job.plans == [plan]
    for cut in plan.cuts:
        assert len(net.get_parameter(f"{cut.group}.weight")) == len(cut.keep)


def test_a_plan_for_another_network_is_refused():
    plan = CampHiVePruner("digits_resnet", replace(CONFIG, criterion="magnitude")).plan(digits_calibration())
    other = CampHiVePruner(timm.create_model("cifar_resnet20"), CONFIG)
    before = copy.deepcopy(other.net)
    with pytest.raises(PlanError, match=r"made for another network.*call plan again"):
        other.apply(plan, digits_calibration())
    assert same_weights(other.net, before) and other.plans == []
    job = CampHiVePruner("digits_resnet", CONFIG)
    job.apply(plan, digits_calibration())
    with pytest.raises(PlanError, match="made for another network"):
        job.apply(plan, digits_calibration())


def digits_calibration():
    return digits(load_base("digits_resnet").net).calibration


def test_apply_without_images_says_why_it_needs_them():
    job = CampHiVePruner("digits_resnet", replace(CONFIG, criterion="magnitude"))
    plan = job.plan(digits_calibration())
    with pytest.raises(ConfigError, match="'reconstruct' reads images; pass the calibration loader"):
        job.apply(plan)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "empty"),
        ([{"image": torch.zeros(1, 3, 16, 16)}], "without 'pixel_values'"),
        ([torch.zeros(1)], "pixel_values"),
    ],
)
def test_calibration_that_cannot_serve(batches, message):
    with pytest.raises(DataError, match=message):
        CampHiVePruner("digits_resnet", CONFIG).plan(batches)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            0.001,
            r"below the smallest that the floors allow, [\d,]+ MACs per image \(\d+\.\d%\); raise target_macs, or set scope to all",
        ),
        (1.0, "no less than the network's 10,203,776 MACs per image; lower it"),
        (20_000_000, "no less than the network's"),
    ],
)
def test_budgets_out_of_reach_are_refused_before_any_work(target, message, monkeypatch):
    job = CampHiVePruner("digits_resnet", replace(CONFIG, target_macs=target))
    monkeypatch.setattr(pruner, "evaluate_accuracy", lambda *a: pytest.fail("evaluated first"))
    with pytest.raises(PlanError, match=message):
        job.run(digits(job.base.net))


@pytest.mark.parametrize("model", [nn.Linear(2, 2), 3, None])
def test_what_is_no_timm_network_is_refused(model):
    with pytest.raises(ModelError, match=r"cannot prune a \w+; give a network of timm\.create_model"):
        CampHiVePruner(model, CONFIG)


@pytest.mark.slow
def test_a_pruned_model_can_be_pruned_again(finetuned, tmp_path):
    first, folder = finetuned
    base = load_base(str(folder))
    assert base.architecture == "digits_resnet" and base.plans == tuple(first.plans)
    second = pruned(replace(CONFIG, target_macs=0.6, cycles=2), model=base)
    again = second.save_pretrained(tmp_path / "again")
    assert same_weights(load_base(str(again)).net, second.net)
    stored = safetensors.torch.load_file(again / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in second.net.state_dict().items())
    assert plans_from_json((again / PLAN_FILE).read_text()) == (*first.plans, *second.plans)
    assert second.plans[0].macs_before == first.plans[-1].macs_after
    assert second.plans[-1].macs_after <= 0.6 * second.plans[0].macs_before
    assert second.report.model_id == "saved"  # of a local path, the last part only


@pytest.mark.slow
def test_saving_before_a_run_reports_what_is_known(tmp_path):
    job = CampHiVePruner("digits_resnet", replace(CONFIG, criterion="magnitude", merge="none"))
    job.apply(job.plan(digits_calibration()), digits_calibration())
    folder = job.save_pretrained(tmp_path / "early")
    report = PruneReport.from_json((folder / REPORT_FILE).read_text())
    assert [(stage.name, stage.accuracy) for stage in report.stages] == [("dense", None), ("pruned", None)]
    assert same_weights(hf_camphive.from_pretrained(folder).timm_model, job.net)
    with pytest.raises(OutputError, match="--overwrite"):
        job.save_pretrained(folder)


def test_push_saves_then_uploads_one_folder(monkeypatch):
    pushed = []

    def push(folder, repo_id, private, token):
        pushed.append((folder.name, repo_id, private, token, sorted(path.name for path in folder.iterdir())))
        return f"https://huggingface.co/{repo_id}"

    monkeypatch.setattr(saving, "push_folder", push)
    job = pruned(replace(CONFIG, criterion="magnitude", merge="none"))
    assert job.push_to_hub("someone/small", private=True) == "https://huggingface.co/someone/small"
    (call,) = pushed
    assert call[:4] == ("small", "someone/small", True, None)
    assert {"README.md", "model.safetensors", PLAN_FILE, REPORT_FILE} <= set(call[4])


# Another classifier


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    """A dataset of three classes, told apart by colour, with a training split only."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(3), 60))
    base = np.array([[220, 40, 40], [40, 220, 40], [40, 40, 220]])[labels][:, None, None]
    pixels = np.clip(base + rng.normal(0, 30, (len(labels), 16, 16, 3)), 0, 255).astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "green", "blue"])}
    )
    columns = {"image": [Image.fromarray(picture) for picture in pixels], "label": labels}
    rows = datasets.Dataset.from_dict(columns, features=features)
    folder = tmp_path_factory.mktemp("data") / "colours"
    datasets.DatasetDict({"train": rows}).save_to_disk(folder)
    return str(folder)


def on_colours(colours, config, **options) -> CampHiVePruner:
    job = CampHiVePruner("digits_resnet", config)
    job.run(load_loaders(colours, job.base.net, config, DataOptions(workers=0)), **options)
    return job


HEAD = replace(CONFIG, head_epochs=3, num_train_epochs=2, per_device_train_batch_size=16)


@pytest.mark.slow
def test_another_classifier_is_trained_and_reported(colours, tmp_path):
    job = on_colours(colours, HEAD)
    assert job.stages["dense"].top1 > 0.5  # chance is a third, and an untrained classifier's accuracy
    assert job.report.head_replaced and "classifier of 10 classes was replaced by one of 3" in job.report.notes[0]
    assert job.net.num_classes == 3 and job.report.dataset_id == "colours"
    folder = job.save_pretrained(tmp_path / "colours-model")
    model = hf_camphive.from_pretrained(folder)
    assert model.config.id2label == {0: "red", 1: "green", 2: "blue"}
    assert same_weights(model.timm_model, job.net)
    assert same_weights(load_base("digits_resnet").net.layer1, job.dense.layer1)  # only the classifier was trained


def test_another_classifier_needs_training_images(colours):
    job = CampHiVePruner("digits_resnet", HEAD)
    loaders = replace(load_loaders(colours, job.base.net, HEAD, DataOptions(workers=0)), train=None)
    with pytest.raises(ConfigError, match=r"10 classes, the dataset 3 and no training split.*choose a dataset"):
        job.run(loaders)


@pytest.mark.slow
def test_without_a_training_split_a_run_says_that_it_did_not_finetune():
    config = replace(CONFIG, num_train_epochs=1, criterion="magnitude", merge="none")
    job = CampHiVePruner("digits_resnet", config)
    job.run(replace(digits(job.base.net), train=None))
    assert job.report.notes == ("Not finetuned: the dataset has no training split.",)
    assert [stage.name for stage in job.report.stages] == ["dense", "pruned"]


# Kills


TWO_CYCLES = replace(CONFIG, cycles=2, num_train_epochs=2, criterion="random", merge="lstsq")


@pytest.fixture(scope="module")
def undisturbed() -> CampHiVePruner:
    return pruned(TWO_CYCLES)


@pytest.mark.parametrize("kill", slow_ones(KILLS, set(KILLS) - {"after the first cycle"}))
def test_a_killed_run_goes_on_to_the_same_end(kill, undisturbed, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, *KILLS[kill])
        with pytest.raises(Killed):
            pruned(TWO_CYCLES, work_dir=tmp_path / "work")
    job = pruned(TWO_CYCLES, work_dir=tmp_path / "work", resume=True)
    assert job.plans == undisturbed.plans
    assert same_weights(job.net, undisturbed.net)
    assert job.report.stages[0].accuracy == undisturbed.report.stages[0].accuracy
    assert job.stages == undisturbed.stages
    assert job.report.groups == undisturbed.report.groups
    losses = [[epoch["loss"] for epoch in run.report.finetune["epochs"]] for run in (job, undisturbed)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_what_is_kept_between_steps_does_not_disturb(undisturbed, tmp_path):
    job = pruned(TWO_CYCLES, work_dir=tmp_path / "work")
    assert job.plans == undisturbed.plans and same_weights(job.net, undisturbed.net)


@pytest.mark.slow
def test_a_resumed_run_does_not_repeat_what_was_done(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, *KILLS["before finetuning"])
        with pytest.raises(Killed):
            pruned(TWO_CYCLES, work_dir=tmp_path / "work")
    monkeypatch.setattr(cycle, "make_plan", lambda *a: pytest.fail("planned again"))
    pruned(TWO_CYCLES, work_dir=tmp_path / "work", resume=True)


@pytest.mark.slow
def test_a_killed_run_with_a_new_classifier_goes_on_to_the_same_end(colours, tmp_path, monkeypatch):
    config = replace(HEAD, criterion="magnitude", merge="none", num_train_epochs=1)
    whole = on_colours(colours, config)
    with monkeypatch.context() as patch:
        kill_after(patch, pruner, "save_progress", 2)
        with pytest.raises(Killed):
            on_colours(colours, config, work_dir=tmp_path / "work")
    monkeypatch.setattr(pruner, "train_head", lambda *a: pytest.fail("trained the classifier again"))
    job = on_colours(colours, config, work_dir=tmp_path / "work", resume=True)
    assert job.plans == whole.plans
    assert same_weights(job.dense, whole.dense)
    assert same_weights(job.net, whole.net)
    assert job.report.head_replaced and job.report.notes == whole.report.notes


@pytest.mark.slow
def test_resuming_where_nothing_was_kept_is_a_fresh_run(undisturbed, tmp_path):
    job = pruned(TWO_CYCLES, work_dir=tmp_path / "work", resume=True)
    assert job.plans == undisturbed.plans and same_weights(job.net, undisturbed.net)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("killed") / "work"
    with pytest.MonkeyPatch.context() as patch:
        kill_after(patch, pruner, "save_progress", 2)
        with pytest.raises(Killed):
            pruned(TWO_CYCLES, work_dir=work)
    return work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed: 0 then, 1 now"),
        ({"target_macs": 0.4}, "target_macs: None then, 0.4 now"),
        ({"weight_decay": 0.1, "cycles": 3}, "cycles: 2 then, 3 now; weight_decay: 0.0005 then, 0.1 now"),
    ],
    ids=str,
)
def test_another_run_is_not_resumed(killed, changes, message):
    with pytest.raises(ConfigError, match=f"another one .*{message}.*resume it with its own options, or remove"):
        pruned(replace(TWO_CYCLES, **changes), work_dir=killed, resume=True)


def test_another_model_or_dataset_is_not_resumed(killed, colours):
    with pytest.raises(ConfigError, match="dataset: 'digits' then, 'colours' now"):
        on_colours(colours, TWO_CYCLES, work_dir=killed, resume=True)
    other = replace(load_base("digits_resnet"), model_id="someone/else")
    with pytest.raises(ConfigError, match="model: 'digits_resnet' then, 'someone/else' now"):
        pruned(TWO_CYCLES, model=other, work_dir=killed, resume=True)


def test_other_weights_under_the_same_name_are_not_resumed(killed):
    other = load_base("digits_resnet")
    other.net.bn1.running_mean[0] += 1e-3
    with pytest.raises(ConfigError, match=r"another one \(weights: '\w{16}' then, '\w{16}' now\); resume it"):
        pruned(TWO_CYCLES, model=other, work_dir=killed, resume=True)


def test_other_rows_or_labels_of_the_same_dataset_are_not_resumed(killed):
    job = CampHiVePruner("digits_resnet", TWO_CYCLES)
    fewer = load_loaders(
        "digits", job.base.net, TWO_CYCLES, DataOptions(workers=0, max_train_samples=200, max_eval_samples=100)
    )
    with pytest.raises(ConfigError, match=r"\(train labels: .*; train rows: 256 then, 200 now; train split: '256 of"):
        job.run(fewer, work_dir=killed, resume=True)
    loaders = digits(job.base.net, TWO_CYCLES)
    relabelled = replace(loaders.info, label_digests={**loaders.info.label_digests, "calibration": "0" * 16})
    with pytest.raises(
        ConfigError, match=r"another one \(calibration labels: '\w{16}' then, '0{16}' now\); resume it"
    ):
        job.run(replace(loaders, info=relabelled), work_dir=killed, resume=True)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")], ids=["old", "cut"])
def test_a_state_whose_weights_cannot_be_checked_is_not_resumed(killed, tmp_path, damage):
    work = shutil.copytree(killed, tmp_path / "work")
    damage(work / "run.json")
    with pytest.raises(
        ConfigError, match=r"whether its model and dataset are the same cannot be checked.*remove that"
    ):
        pruned(TWO_CYCLES, work_dir=work, resume=True)


def test_a_fresh_run_in_the_folder_of_another_one_never_mixes_with_it(killed, tmp_path, monkeypatch):
    work = shutil.copytree(killed, tmp_path / "work")
    other = load_base("digits_resnet")
    other.net.bn1.running_mean[0] += 1e-3
    with monkeypatch.context() as patch:
        patch.setattr(saving, "save_folder", lambda *a, **k: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            pruned(TWO_CYCLES, model=other, work_dir=work)
    assert load_progress(work, TWO_CYCLES, run_identity(other, digits(other.net, TWO_CYCLES).info)) is None


def test_a_damaged_state_is_named(killed, tmp_path):
    work = tmp_path / "work"
    subprocess.run(["cp", "-r", killed, work], check=True)
    weights = work / "network" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"cannot be resumed.*remove that folder to start afresh"):
        pruned(TWO_CYCLES, work_dir=work, resume=True)


HIVE = replace(
    CONFIG,
    criterion="hive",
    eigensolver="power",
    merge="none",
    cycles=2,
    power_steps=6,
    power_tolerance=1e-12,
    num_eigenpairs=2,
)


@pytest.mark.slow
def test_a_run_killed_in_its_power_iteration_goes_on_from_its_last_block(tmp_path, monkeypatch):
    whole = pruned(HIVE)
    with monkeypatch.context() as patch:
        kill_after(
            patch, IterationCheckpoint, "save", 5 + 3
        )  # 5 saves a cycle, as none follows the last of the 6 steps
        with pytest.raises(Killed):
            pruned(HIVE, work_dir=tmp_path / "work")
    steps = []
    monkeypatch.setattr(IterationCheckpoint, "save", lambda memory, state: steps.append(int(state["steps"])))
    job = pruned(HIVE, work_dir=tmp_path / "work", resume=True)
    assert steps == [4, 5]
    assert job.plans == whole.plans and same_weights(job.net, whole.net)
    assert all(torch.equal(job.scores[name], scores) for name, scores in whole.scores.items())


@pytest.mark.slow
def test_a_fresh_run_ignores_the_iteration_of_an_older_one(tmp_path):
    memory = IterationCheckpoint(tmp_path / "work")
    memory.work_dir.mkdir()
    memory.save({"block": torch.ones(3, 2), "steps": torch.tensor(4)})
    assert pruned(replace(HIVE, cycles=1, power_steps=1), work_dir=memory.work_dir).plans
    assert memory.load() is None


def test_a_damaged_iteration_is_named(tmp_path):
    memory = IterationCheckpoint(tmp_path)
    memory.save({"block": torch.ones(3, 2), "steps": torch.tensor(4)})
    assert torch.equal(memory.load()["block"], torch.ones(3, 2))
    path = tmp_path / "iteration.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ConfigError, match=r"iteration\.safetensors cannot be read .*; remove it"):
        memory.load()


def test_only_the_main_process_writes_the_iteration(tmp_path):
    IterationCheckpoint(tmp_path, writes=False).save({"block": torch.ones(3, 2), "steps": torch.tensor(4)})
    assert list(tmp_path.iterdir()) == []


# Several processes


class SecondOfTwo:
    """An accelerator that says it is not the main process."""

    is_main_process, is_local_main_process, process_index, num_processes = False, False, 1, 2

    def __init__(self, accelerator):
        self.device = accelerator.device


def test_only_the_main_process_measures_latency(monkeypatch):
    job = pruned(replace(CONFIG, criterion="magnitude", merge="none"))
    measured = {name: {1: Latency(2.0, 1.0, 3.0, 9)} for name in ("dense", "pruned", "dense folded", "pruned folded")}
    monkeypatch.setattr(launch, "broadcast_object_list", lambda objects: [measured, None], raising=False)
    monkeypatch.setattr(pruner, "measure_latency", lambda *a: pytest.fail("measured beside the main process"))
    monkeypatch.setattr(pruner, "fold", lambda *a: pytest.fail("folded what it does not measure"))
    job.cycle.workers = Workers(SecondOfTwo(job.accelerator))
    report = job._report(None, "", latency=True)
    for stage in report.stages:
        assert stage.footprint.latency_ms == stage.footprint.folded_ms == {1: Latency(2.0, 1.0, 3.0, 9)}


@pytest.mark.slow
def test_two_processes_make_the_plan_of_one(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path / "two")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one = pruned(PARALLEL)
    two = load_base(str(tmp_path / "two"))
    assert [path.name for path in tmp_path.glob("two-measured-*")] == ["two-measured-0"]
    assert two.plans == tuple(one.plans)
    for name, tensor in one.net.state_dict().items():
        assert torch.allclose(two.net.state_dict()[name].double(), tensor.double(), rtol=1e-3, atol=1e-4), name


PARALLEL = replace(CONFIG, calibration_size=300, cycles=2)

if __name__ == "__main__":
    rank = os.environ["RANK"]

    def measure(*arguments):
        Path(f"{sys.argv[1]}-measured-{rank}").touch()
        return measure_briefly(*arguments)

    pruner.measure_latency = measure
    job = pruned(PARALLEL, work_dir=Path(sys.argv[1] + "-work"))
    assert job.accelerator.num_processes == 2
    first, second = gather_object([job.report.stages])
    assert first == second
    job.save_pretrained(sys.argv[1])
