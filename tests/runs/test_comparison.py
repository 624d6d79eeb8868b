"""A comparison runs what it was asked for, once, alike for all methods, and never on images that it measures with."""

import json
from dataclasses import replace
from itertools import pairwise

import datasets
import pytest
import torch
from support.plans import analysis_of
from support.toys import ToyResNet, images, randomise

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError, OutputError, PlanError, ReconstructionError, TrainingError
from hf_camphive.core.methods import MERGE_RULES
from hf_camphive.core.plan import ChannelCut, PrunePlan
from hf_camphive.hub.loading import load_base
from hf_camphive.network.footprint import count_macs
from hf_camphive.network.graph.tracing import trace_network
from hf_camphive.pruning.scoring.criteria import SCORERS, ScoringContext
from hf_camphive.runs import comparison
from hf_camphive.runs.comparison import Comparison, grid
from hf_camphive.runs.cycle import PruningCycle
from hf_camphive.runs.pruner import CampHiVePruner
from hf_camphive.runs.results import Cell, Results, Row
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.data.loaders import DataOptions, load_loaders
from hf_camphive.training.evaluation import evaluate_accuracy

CONFIG = CampHiVeConfig(num_train_epochs=0, polish_steps=0, mixed_precision="no", curvature_images=16, power_steps=3)
BASE = load_base("digits_resnet")
DATA = {"dataset": "digits"}


def digits(config, dataset="digits"):
    return load_loaders(dataset, BASE.net, config, DataOptions(workers=0, max_train_samples=128, max_eval_samples=100))


def opened(folder, config=CONFIG, load=digits, **options):
    return Comparison(BASE, config, load, folder, data=DATA, **options)


def cells(methods="magnitude", merges="none", ratios=(2.0,), seeds=1, size=64, **options):
    return grid(methods.split(), merges.split(), ratios, seeds, calibration_sizes=[size], **options)


def halves(problem):
    """A method of its own: the first half of every group that may be cut between blocks and within."""
    free = [group for group in problem.trace.groups if not group.frozen]
    cuts = tuple(ChannelCut(group.name, tuple(range(group.size // 2))) for group in free)
    problem.net.requires_grad_(False).apply(lambda module: [p.zero_() for p in module.parameters()])
    before = count_macs(problem.net, problem.trace.input_size)
    return PrunePlan(problem.trace.groups, (), cuts, (), "", "", before, before // 3)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small grid that has run, the folder, and how often each criterion was asked for scores."""
    folder = tmp_path_factory.mktemp("comparison") / "deep" / "grid"
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        fisher = SCORERS["fisher"]
        patch.setitem(SCORERS, "fisher", lambda context: asked.append(context.config) or fisher(context))
        run = opened(folder, methods={"halves": halves})
        chosen = cells("fisher", "none reconstruct", (1.5, 2.0)) + cells("halves", "none", seeds=2)
        return run.run(chosen), folder, chosen, asked


# The grid


def test_a_grid_is_every_combination_once_seed_after_seed():
    chosen = grid(["a", "b", "a"], ["none"], [2.0, 3.0], seeds=2, cycles=[1, 4], calibration_sizes=[64, 128])
    assert len(chosen) == len(set(chosen)) == 2 * 2 * 2 * 2 * 2
    assert [cell.seed for cell in chosen] == [0] * 16 + [1] * 16
    assert (
        chosen[0] == Cell("a", "none", 2.0, 1, 64, 0) and str(chosen[0]) == "a none 2x cycles=1 calibration=64 seed=0"
    )


# Runs


def test_a_row_is_what_the_pruner_does_with_the_same_options(finished):
    results, *_ = finished
    (row,) = [row for row in results.rows if str(row.cell).startswith("fisher none 2x")]
    config = replace(CONFIG, criterion="fisher", merge="none", target_macs=0.5, calibration_size=64)
    pruner, loaders = CampHiVePruner(BASE, config), digits(config)
    net = pruner.apply(pruner.plan(loaders.calibration), loaders.calibration)
    loader, split = loaders.evaluation
    assert row.delivered == evaluate_accuracy(net, loader, pruner.accelerator, split).top1
    assert row.dense == evaluate_accuracy(BASE.net, loader, pruner.accelerator, split).top1
    assert row.macs == count_macs(net, (3, 16, 16)) and row.dense_macs == count_macs(BASE.net, (3, 16, 16))
    assert (row.split, row.images, row.calibration) == (split, 100, "64 of 1,197 rows of train")
    assert row.pruned != row.recalibrated == row.delivered


def test_merge_rules_deliver_what_they_ask_for(finished):
    rows = {(row.cell.merge, row.cell.ratio): row for row in finished[0].rows if row.cell.method == "fisher"}
    assert all(row.recalibrates is MERGE_RULES[merge].recalibrates for (merge, _), row in rows.items())
    assert rows["reconstruct", 2.0].delivered == rows["reconstruct", 2.0].pruned
    assert rows["reconstruct", 2.0].macs == rows["none", 2.0].macs  # the same scores, so the same plan


def test_dense_scores_are_worked_out_once_and_reported_in_every_row(finished):
    results, *_, asked = finished
    assert len(asked) == 1
    assert len({row.seconds["score"] for row in results.rows if row.cell.method == "fisher"}) == 1


@pytest.mark.parametrize("criterion", SCORERS)
def test_scores_do_not_depend_on_what_is_done_with_them(criterion):
    """Else they must not be shared between merge rules, ratios and cycles."""
    net = randomise(ToyResNet())
    config = replace(CONFIG, criterion=criterion, calibration_size=16, power_tolerance=0.0)
    other = replace(config, merge="none", target_macs=0.3, cycles=3)
    calibration = Calibration((images(16),), (torch.arange(16) % 3,), (torch.arange(16),), 16)
    analysis = analysis_of(net, trace_network(net, (3, 8, 8)))

    def scores(config):
        with torch.no_grad():
            return SCORERS[criterion](ScoringContext(analysis, calibration, config))

    expected, found = scores(config), scores(other)
    assert all(torch.equal(found[name], expected[name]) for name in expected) and config.merge != other.merge


def test_a_method_of_ones_own_is_given_a_copy_and_treated_like_the_others(finished):
    results, *_ = finished
    rows = [row for row in results.rows if row.cell.method == "halves"]
    assert len(rows) == 2 and all(0 < row.pruned <= 1 for row in rows)
    plan_macs = {row.macs for row in rows}
    assert len(plan_macs) == 1 and plan_macs.pop() < 0.4 * rows[0].dense_macs
    assert any(tensor.any() for tensor in BASE.net.parameters())
    assert {row.recalibrated for row in rows} != {rows[0].pruned}


@pytest.mark.slow
def test_finetuning_is_the_same_for_all(tmp_path, monkeypatch):
    """Every row sees the same images in the same order, augmented alike, and has the dense network as its teacher."""
    seen, real = [], comparison.finetune

    def watched(net, loaders, config, accelerator, teacher):
        seen.append(next(iter(loaders.train))["pixel_values"])
        assert torch.equal(teacher.get_classifier().weight, BASE.net.get_classifier().weight)
        return real(net, loaders, config, accelerator, teacher)

    monkeypatch.setattr(comparison, "finetune", watched)
    run = opened(tmp_path, replace(CONFIG, num_train_epochs=1))
    first, second = run.run(cells(ratios=(1.5, 2.0))).rows
    assert torch.equal(*seen)
    assert second.final == second.finetuned != second.delivered and first.seconds["finetune"] > 0


def test_polished_rows_say_what_polishing_gave(tmp_path, monkeypatch):
    def spoil(pruner, calibration):
        assert len(calibration.images[0]) == 64
        torch.nn.init.zeros_(pruner.net.get_classifier().weight)
        pruner.log.notes.append("spoilt")
        return pruner.net

    monkeypatch.setattr(PruningCycle, "polish", spoil)
    (row,) = opened(tmp_path, replace(CONFIG, polish_steps=2)).run(cells("fisher", "none")).rows
    assert row.final == row.polished < 0.3 < row.delivered
    assert row.notes == ("spoilt",)


@pytest.mark.slow
def test_several_cycles_end_at_the_same_budget(tmp_path):
    one, two = opened(tmp_path).run(cells("fisher", "none", cycles=[1, 2])).rows
    assert (one.cell.cycles, two.cell.cycles) == (1, 2) and one.pruned != two.pruned
    assert max(one.macs, two.macs) <= one.dense_macs / 2
    assert two.seconds["score"] > 0 and two.recalibrated == two.delivered


# Images


def test_calibration_images_follow_the_seed_and_are_never_tested_on(tmp_path):
    everything = datasets.concatenate_datasets(list(datasets_of_digits().values()))
    datasets.DatasetDict({"validation": everything}).save_to_disk(tmp_path / "one_split")
    run = opened(tmp_path / "grid", load=lambda config: digits(config, str(tmp_path / "one_split")))
    seen = []
    for seed in (0, 1):
        found = run._images_of(Cell("magnitude", "none", 2.0, 1, 64, seed))
        calibration = {image.numpy().tobytes() for batch in found.calibration.images for image in batch.contiguous()}
        tested = {image.numpy().tobytes() for batch in found.test for image in batch["pixel_values"].contiguous()}
        assert len(calibration) == 64 and len(tested) == 100 and not calibration & tested
        seen.append(calibration)
    assert seen[0] != seen[1]


def datasets_of_digits():
    from hf_camphive.training.data.datasets import digits as bundled

    return bundled()


def test_test_images_that_do_not_fit_are_read_anew(monkeypatch):
    loader, _ = digits(CONFIG).evaluation
    held = comparison._in_memory(loader)
    assert held is not loader
    for ours, theirs in zip(held, loader, strict=True):
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"]) and torch.equal(
            ours["labels"], theirs["labels"]
        )
    monkeypatch.setattr(comparison, "MAX_BYTES_IN_MEMORY", 1000)
    assert comparison._in_memory(loader) is loader


# Going on


def test_the_files_agree(finished):
    results, folder, chosen, _ = finished
    kept = Results.from_json((folder / "results.json").read_text(), "")
    assert kept == results == opened(folder).results and {row.cell for row in kept.rows} == set(chosen)
    assert (folder / "results.csv").read_text() == kept.to_csv()
    assert (folder / "results.md").read_text() == kept.to_markdown()
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in folder.iterdir() if not path.name.endswith(".lock")} == {
        *("results.json", "results.csv", "results.md", "results.png")
    }


def fake_row(cell):
    return Row(cell, 0.9, 0.5, 0.6, None, True, 100, "test", "64 rows", 100, 50, 10, 0)


def test_what_is_done_is_not_run_again_and_the_interrupted_is(tmp_path, monkeypatch):
    chosen, ran = cells(ratios=(1.5, 2.0, 3.0)), []

    def interrupted(self, cell):
        ran.append(cell)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return fake_row(cell)

    monkeypatch.setattr(Comparison, "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path).run(chosen)
    assert opened(tmp_path).results.done() == {chosen[0]}
    results = opened(tmp_path).run([*chosen, *cells("random")])
    assert ran == [chosen[0], chosen[1], chosen[1], chosen[2], *cells("random")]
    assert results.done() == {*chosen, *cells("random")}


@pytest.mark.parametrize("error", [PlanError, TrainingError, ReconstructionError])
def test_what_fails_is_noted_and_tried_again(tmp_path, monkeypatch, error):
    chosen = cells(ratios=(1.5, 2.0))

    def fails(self, cell):
        if cell == chosen[0]:
            raise error("the reason")
        return fake_row(cell)

    monkeypatch.setattr(Comparison, "_run", fails)
    results = opened(tmp_path).run(chosen)
    assert results.done() == {chosen[1]} and results.failed == {str(chosen[0]): "the reason"}
    assert "the reason" in (tmp_path / "results.md").read_text()
    monkeypatch.setattr(Comparison, "_run", lambda self, cell: fake_row(cell))
    again = opened(tmp_path).run(chosen)
    assert again.done() == set(chosen) and not again.failed


def test_two_processes_can_fill_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "_run", lambda self, cell: fake_row(cell))
    first, second = opened(tmp_path), opened(tmp_path)
    first.run(cells("magnitude"))
    second.run(cells("random"))
    assert opened(tmp_path).results.done() == {*cells("magnitude"), *cells("random")} == second.results.done()


# Refusals


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (cells("magnitud"), "no method 'magnitud'; did you mean 'magnitude'"),
        (cells("x"), "no method 'x'; choose from merge-aware, .*halves"),
        (cells(merges="lstq"), "no merge rule 'lstq'; did you mean 'lstsq'"),
        (cells(ratios=(0.5,)), "ratio 0.5 must be above 1"),
        (cells(ratios=(float("nan"),)), "ratio nan must be above 1"),
        (cells(ratios=(1e6,)), "below the smallest that the floors allow"),
        (cells(seeds=0), "nothing to compare"),
        (cells(cycles=[0]), "cycles is 0; it must be at least 1"),
        (cells("halves", "cyclic"), "gives a plan without scores"),
        (cells("fisher", size=8), "needs at least 16 images"),
        (cells("fisher", size=5000), "the dataset has 1197 images for calibration"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, chosen, message):
    run = opened(tmp_path / "grid", methods={"halves": halves})
    with pytest.raises((ConfigError, PlanError), match=message):
        run.run(chosen)
    assert not list(tmp_path.iterdir())


def test_weights_are_not_compared(tmp_path):
    config = CampHiVeConfig.from_preset("camphive-paper-weights", num_train_epochs=0.0)
    with pytest.raises(ConfigError, match="zeroing single weights saves none"):
        opened(tmp_path / "grid", config).check(cells())


def test_results_of_other_settings_are_refused(finished):
    _, folder, *_ = finished
    before = files(folder)
    with pytest.raises(ConfigError, match=r"other settings.*learning_rate: 0\.005 then, 0\.1 now"):
        opened(folder, replace(CONFIG, learning_rate=0.1))
    other = load_base("digits_resnet")
    next(other.net.parameters()).data.add_(1)
    with pytest.raises(ConfigError, match="weights: "):
        Comparison(other, CONFIG, digits, folder, data=DATA)
    with pytest.raises(ConfigError, match="dataset: 'digits' then, 'mnist' now"):
        Comparison(BASE, CONFIG, digits, folder, data={"dataset": "mnist"})
    assert files(folder) == before


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.csv").write_text("years of work")
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "results.json").write_text(json.dumps({"accuracy": 1}))
    for name, message in (
        ("mine", "holds results.csv but no results.json"),
        ("file", "is a file"),
        ("damaged", "results.json has no schema, so that hf_camphive did not write it; .* another --output-dir"),
    ):
        with pytest.raises(OutputError, match=message):
            opened(tmp_path / name)
    assert (tmp_path / "mine" / "results.csv").read_text() == "years of work"


def test_fewer_macs_are_never_more(finished):
    rows = [row for row in finished[0].rows if row.cell.method == "fisher" and row.cell.merge == "none"]
    assert all(a.macs > b.macs for a, b in pairwise(rows)) and len(rows) == 2
