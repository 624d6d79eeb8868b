"""Every mistake ends in exit code 2, one clear line and nothing written; what a run prints is true."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from support.cli import QUICK, prune, refused, snapshot

import hf_camphive
from hf_camphive.cli import main as cli
from hf_camphive.cli.commands.prune import DEMO, prune_arguments
from hf_camphive.cli.inputs import BUNDLED_MODEL, DataArguments, ModelArguments, dataset_name
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import TrainingError
from hf_camphive.core.plan import PLAN_FILE, plans_from_json
from hf_camphive.hub import saving
from hf_camphive.hub.loading import BUNDLED
from hf_camphive.hub.report import REPORT_FILE, PruneReport
from hf_camphive.network import analysis
from hf_camphive.runs import pruner

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> Path:
    """Folders of datasets that lack something."""
    folder = tmp_path_factory.mktemp("tables")
    pictures = [Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)) for i in range(20)]
    image, label = datasets.Image(), datasets.ClassLabel(names=["a", "b"])
    for name, columns, features in (
        ("blind", {"text": ["x"] * 20, "label": [0, 1] * 10}, {"text": datasets.Value("string"), "label": label}),
        ("unlabelled", {"image": pictures, "text": ["x"] * 20}, {"image": image, "text": datasets.Value("string")}),
    ):
        rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        datasets.DatasetDict({"train": rows}).save_to_disk(folder / name)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], r"'no-such-model' is neither a folder, nor a Hub id"),
        (["--model", "timm/resnet18.a1_in1kk"], "neither in the cache nor can it be downloaded.*did you mean"),
        (["--model", "./nowhere"], "no folder './nowhere'"),
        (["--model", "resnet18", "--checkpoint", "weights.pth"], "pickle"),
        (["--dataset", "no-such-dataset"], "no-such-dataset"),
        (["--dataset", "digit"], "did you mean 'digits'"),
        (["--image-column-name", "picture"], "picture"),
        (["--label-column-name", "kind"], "kind"),
        (
            ["--target-macs", "0.01"],
            r"below the smallest that the floors allow, [\d,]+ MACs per image \([\d.]+%\); raise target_macs",
        ),
        (["--target-macs", "2"], "2.0x reduction write 0.5"),
        (["--target-macs", "nan"], "target_macs is nan; it must be a finite number"),
        (["--target-macs", "-1"], "target_macs is -1.0; give a fraction"),
        (["--calibration-size", "4"], "needs at least 16 images; raise it, or use magnitude, bn-scale or random with"),
        (
            ["--preset", "camphive-paper-weights", "--round-to", "8"],
            "round_to is 8, but granularity 'weight' cuts nothing",
        ),
        (["--preset", "camphive-paper-weights", "--dry-run"], "cuts nothing that a plan could show"),
        (["--granularity", "weight"], "start from preset camphive-paper-weights"),
        (["--distillation", "2"], "a share between 0 and 1"),
        (["--layer-max-ratio", "conv1"], "layer_max_ratio has 'conv1'; write PATTERN=SHARE"),
        (["--keep", "conv9*"], "keep: no layer of this network matches 'conv9.'"),
        (["--push-to-hub"], "add --hub-model-id user/name"),
        (["--dry-run", "--resume"], "nothing to push or to resume"),
        (["--dry-run", "--push-to-hub", "--hub-model-id", "a/b"], "nothing to push or to resume"),
        (["--output-dir", ".."], "not empty and was not saved by hf_camphive"),
        (["--output-dir", "."], "not empty and was not saved by hf_camphive"),
    ],
    ids=" ".join,
)
def test_mistakes(capsys, arguments, message):
    Path("something.txt").write_text("of the user's")
    assert re.search(message, refused(capsys, *arguments))


def test_a_stream_without_end_is_refused_before_any_work(capsys):
    arguments = ["prune", "--streaming", "--output-dir", "out"]
    assert cli.main(arguments) == 2
    assert "add --max-train-samples, or --epochs 0" in capsys.readouterr().err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(("folder", "message"), [("blind", "image"), ("unlabelled", "label")])
def test_datasets_that_lack_a_column(capsys, tables, folder, message):
    assert re.search(message, refused(capsys, "--dataset", tables / folder))


def test_a_network_without_anything_to_prune(capsys, monkeypatch):
    real = analysis.trace_network

    def all_frozen(net, size):
        trace = real(net, size)
        return replace(trace, groups=tuple(replace(group, frozen="nothing reads it") for group in trace.groups))

    monkeypatch.setattr(analysis, "trace_network", all_frozen)
    assert "no channel group of this network can be pruned" in refused(capsys)


def test_an_error_before_anything_was_kept_leaves_only_what_others_wrote(capsys, monkeypatch):
    def broken(*arguments):
        raise TrainingError("the network's outputs are not numbers")

    monkeypatch.setattr(pruner, "evaluate_accuracy", broken)
    Path("outputs").mkdir()
    Path("outputs", "mine.txt").write_text("mine")
    assert refused(capsys) == "error: the network's outputs are not numbers"
    assert refused(capsys, "--output-dir", "deep/small") == "error: the network's outputs are not numbers"
    assert Path("outputs", "mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_done_before(capsys, monkeypatch):
    real, written = saving._put_in_place, []

    def limited(temporary, folder):
        written.append(folder)
        if len(written) == 3:  # the dense network and the first cycle are on disk, the second cycle finds no space
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(temporary, folder)

    options = ["--cycles", "2", "--merge", "none", "--output-dir", "out/small"]
    with monkeypatch.context() as patch:
        patch.setattr(saving, "_put_in_place", limited)
        assert prune(*options) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "No space left on device" in told
    assert told.endswith(
        "what the run did so far is kept in out/.small.work: fix this and add --resume, or start afresh with --overwrite"
    )
    cycles = plans_from_json(Path("out/.small.work/network", PLAN_FILE).read_text())
    assert len(cycles) == 1
    assert prune(*options, "--resume") == 0
    assert [path.name for path in Path("out").iterdir()] == ["small"]
    assert plans_from_json(Path("out/small", PLAN_FILE).read_text())[:1] == cycles


@pytest.mark.slow
def test_a_full_disk_at_the_very_end_keeps_the_run(capsys, monkeypatch):
    real = saving._put_in_place

    def limited(temporary, folder):
        if folder.name == "small":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(temporary, folder)

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_put_in_place", limited)
        assert prune("--merge", "none", "--output-dir", "small") == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .endswith("kept in .small.work: fix this and add --resume, or start afresh with --overwrite")
    )
    assert [path.name for path in Path.cwd().iterdir()] == [".small.work"]


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_keeps_the_pruned_network(capsys):
    options = ["--epochs", "2", "--per-device-train-batch-size", "32", "--merge", "none", "--output-dir", "small"]
    assert prune(*options, "--learning-rate", "1e30") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"Lower --learning_rate.*kept in \.small\.work: fix this and add --resume, or start afresh with --overwrite$",
        told,
    )
    pruned = plans_from_json(Path(".small.work/network", PLAN_FILE).read_text())
    assert len(pruned) == 1
    assert prune(*options, "--learning-rate", "0.01", "--resume") == 0  # the cure that the error names
    found = PruneReport.from_json(Path("small", REPORT_FILE).read_text())
    assert found.config["learning_rate"] == 0.01 and len(found.finetune["epochs"]) == 2
    assert plans_from_json(Path("small", PLAN_FILE).read_text()) == pruned


def test_output_folders_that_hold_something(capsys, saved):
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("years of work")
    assert "not saved by hf_camphive" in refused(capsys, "--output-dir", "mine", "--overwrite")
    before = snapshot(saved)
    assert "overwrite it (--overwrite)" in refused(capsys, "--output-dir", saved)
    assert "holds a pruned model" in refused(capsys, "--output-dir", saved, "--overwrite", "--dry-run")
    assert snapshot(saved) == before
    Path("file").write_text("")
    assert "is a file" in refused(capsys, "--output-dir", "file")


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("config.json", lambda data: data[: len(data) // 2], "config.json of 'copy' is damaged"),
        ("config.json", lambda data: b'{"model_type": "vit"}', "type 'vit', not a timm image classifier"),
        ("model.safetensors", lambda data: data[: len(data) // 2], "'copy'.*(damaged|incomplete|truncated)"),
        ("prune_plan.json", lambda data: b"{}", "prune_plan.json of 'copy' is missing or damaged"),
    ],
)
def test_damaged_models(capsys, saved, file, damage, message):
    shutil.copytree(saved, "copy")
    path = Path("copy", file)
    path.write_bytes(damage(path.read_bytes()))
    assert re.search(message, refused(capsys, "--model", "copy"))


def test_a_run_saves_what_it_prints(capsys, caplog):
    arguments = ["--epochs", "1", "--output-dir", "deep/small", "--per-device-train-batch-size", "64", "--seed", "3"]
    with caplog.at_level("INFO", "hf_camphive"):
        assert prune(*arguments) == 0
    told = capsys.readouterr()
    folder = Path("deep/small")
    found = PruneReport.from_json((folder / REPORT_FILE).read_text())
    assert found.table() in told.out
    for line in ("deep/small/model.safetensors", "deep/small/README.md", 'from_pretrained("deep/small")'):
        assert line in told.out
    assert all((folder / name).is_file() for name in ("model.safetensors", "README.md", "plots/widths.png"))
    assert sorted(path.name for path in Path("deep").iterdir()) == ["small"]  # no work folder is left
    assert hf_camphive.from_pretrained(folder).num_labels == 10
    assert found.config["num_train_epochs"] == 1.0 and found.config["seed"] == 3
    assert "Writing model shards" not in told.err
    said = [record.getMessage() for record in caplog.records]
    assert any(
        re.fullmatch(r"Finetune, epoch 1 of 1: loss [\d.]+, validation top-1 [\d.]+ %, [\d.]+ s", s) for s in said
    )
    assert not any("EpochLog" in s for s in said)


@pytest.mark.slow
def test_the_command_is_published_without_this_machines_folders(tmp_path):
    output = tmp_path / "secret-folder" / "small"
    assert prune("--output-dir", output, "--model=digits_resnet", "--merge", "none") == 0
    for file in output.rglob("*"):
        if file.suffix in (".json", ".md"):
            assert "secret-folder" not in file.read_text() and str(tmp_path) not in file.read_text(), file
    command = PruneReport.from_json((output / REPORT_FILE).read_text()).command
    assert command.startswith("camphive prune --calibration-size 64") and "--output-dir small" in command
    again = tmp_path / "again"
    assert prune("--output-dir", again, f"--model={output}", "--dataset", "digits", "--merge", "none") == 0
    found = PruneReport.from_json((again / REPORT_FILE).read_text())
    assert "--model=small" in found.command and found.model_id == "small"
    assert str(tmp_path) not in (again / "README.md").read_text() + (again / REPORT_FILE).read_text()
    assert len(plans_from_json((again / PLAN_FILE).read_text())) == 2


@pytest.mark.slow
def test_overwriting_replaces_the_model(saved, tmp_path):
    shutil.copytree(saved, "small")
    assert prune("--output-dir", "small", "--overwrite", "--target-macs", "0.8", "--merge", "none") == 0
    assert PruneReport.from_json(Path("small", REPORT_FILE).read_text()).config["target_macs"] == 0.8


def test_a_dry_run_plans_and_a_real_one_can_follow(capsys):
    assert prune("--dry-run", "--output-dir", "small") == 0
    told = capsys.readouterr().out
    assert [path.name for path in Path.cwd().iterdir()] == ["small"]
    assert [path.name for path in Path("small").iterdir()] == [PLAN_FILE]
    (plan,) = plans_from_json(Path("small", PLAN_FILE).read_text())
    assert plan.summary() in told and "Nothing was changed. The plan is in small/prune_plan.json" in told
    assert prune("--dry-run", "--output-dir", "small") == 0
    assert prune("--output-dir", "small") == 0
    assert plans_from_json(Path("small", PLAN_FILE).read_text()) == (plan,)


@pytest.mark.slow
def test_a_pushed_run_is_told_where(capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr(saving, "push_folder", lambda *a, **k: pushed.append((a, k)) or "https://hub/someone/small")
    options = ["--push-to-hub", "--hub-model-id", "someone/small", "--hub-private-repo", "--merge", "none"]
    assert prune("--output-dir", "small", *options) == 0
    assert pushed == [((Path.cwd() / "small", "someone/small"), {"private": True})]
    assert "Pushed to https://hub/someone/small" in capsys.readouterr().out


KILLED_RUN = """
import os, signal, sys
from hf_camphive.cli import main as cli
from hf_camphive.runs import pruner
real = pruner.save_progress
def deadly(*args):
    real(*args)
    os.kill(os.getpid(), signal.SIGKILL)
pruner.save_progress = deadly
cli.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_the_same_command(capsys):
    options = [*QUICK, "--dataloader-num-workers", "0", "--cycles", "2", "--output-dir", "out/small"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED_RUN, "prune", *options], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in Path("out").iterdir()] == [".small.work"]
    other = ["--cycles", "2", "--output-dir", "out/small", "--resume", "--seed", "9"]
    assert "seed: 0 then, 9 now" in refused(capsys, *other)
    assert Path("out/.small.work").is_dir()
    assert prune("--cycles", "2", "--output-dir", "out/small", "--resume") == 0
    assert [path.name for path in Path("out").iterdir()] == ["small"]
    assert prune("--cycles", "2", "--output-dir", "whole") == 0
    both = [plans_from_json(Path(folder, PLAN_FILE).read_text()) for folder in ("out/small", "whole")]
    assert both[0] == both[1] and len(both[0]) == 2
    weights = [Path(folder, "model.safetensors").read_bytes() for folder in ("out/small", "whole")]
    assert weights[0] == weights[1]


def test_a_restart_does_not_discard_the_state_of_a_run_that_was_cut_off(capsys):
    state = Path(".small.work", "network", "model.safetensors")
    state.parent.mkdir(parents=True)
    state.write_bytes(b"hours of work")
    message = refused(capsys, "--output-dir", "small")
    assert "a run that was cut off left its state in .small.work" in message
    assert message.endswith("go on with --resume, or start afresh with --overwrite, which discards it")
    assert prune("--dry-run", "--output-dir", "small") == 0 and state.exists()
    state.parent.rename(".small.work/.network.old-0123abcd")  # killed while it replaced the state of a cycle
    assert "go on with --resume" in refused(capsys, "--output-dir", "small")
    assert prune("--output-dir", "small", "--overwrite", "--merge", "none") == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["small"]


# The demo


@pytest.mark.parametrize("arguments", [[], ["--overwrite"], ["--output-dir", "small", "--resume"]])
def test_without_options_that_choose_the_run_is_the_demo(arguments):
    *_, config = prune_arguments(arguments)
    assert config == CampHiVeConfig(**DEMO) and config.budgets == {"latency": DEMO["target_latency"]}


@pytest.mark.parametrize("option", [["--model", "digits_resnet"], ["--seed", "1"], ["--max-eval-samples", "9"]])
def test_with_an_option_that_chooses_the_usual_budget_holds(option):
    *_, config = prune_arguments(option)
    assert config.budgets == {"macs": 0.5}


def test_make_demo_spells_the_demo_out():
    command = re.search(r"scripts/prune.py (.+)", (ROOT / "Makefile").read_text()).group(1).split()
    model, _, run, config = prune_arguments(command)
    assert run.overwrite and model.model == BUNDLED_MODEL and config == CampHiVeConfig(**DEMO)
    assert {f"--{name.replace('_', '-')}" for name in DEMO} < set(command)


def test_the_network_of_the_demo_is_bundled_and_so_are_its_images():
    assert BUNDLED_MODEL in BUNDLED
    assert {dataset_name(ModelArguments(name), DataArguments()) for name in BUNDLED} == {"digits"}
