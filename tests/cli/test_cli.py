"""The command line: every mistake ends in exit code 2, one clear line and nothing written; what is printed is true."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.brief import skip_folding, time_briefly
from transformers import AutoModelForImageClassification

import hf_camphive
from hf_camphive.cli import main as cli
from hf_camphive.cli.arguments import BUNDLED_MODEL, DEMO, config_from, config_options, parse, preset_options
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import TrainingError
from hf_camphive.core.measures import format_count, format_share
from hf_camphive.core.methods import PRESETS
from hf_camphive.core.plan import PLAN_FILE, plans_from_json
from hf_camphive.hub import saving
from hf_camphive.hub.loading import BUNDLED, load_base
from hf_camphive.hub.report import REPORT_FILE, PruneReport
from hf_camphive.network import analysis
from hf_camphive.network.footprint import count_macs
from hf_camphive.runs import pruner

ROOT = Path(__file__).parents[2]
QUICK = "--calibration-size 64 --epochs 0 --polish-steps 0 --max-train-samples 256 --max-eval-samples 100 --mixed-precision no".split()
QUICK += ["--model", "digits_resnet"]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    time_briefly(monkeypatch)
    skip_folding(monkeypatch)


def prune(*arguments: str) -> int:
    return cli.main(["prune", *QUICK, "--dataloader-num-workers", "0", *map(str, arguments)])


def refused(capsys, *arguments: str) -> str:
    """The message of a run that must fail and leave the working folder as it was."""
    before = snapshot(Path.cwd())
    assert prune(*arguments) == 2
    assert snapshot(Path.cwd()) == before
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("cli") / "small"
    with pytest.MonkeyPatch.context() as patch:
        time_briefly(patch)
        assert prune("--output-dir", folder) == 0
    return folder


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


# Presets


def parsed(*arguments: str) -> CampHiVeConfig:
    return config_from(parse(cli.prune, [*map(str, arguments)], preset_options(), config_options())[1])


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_a_recipe_that_flags_override(name):
    assert parsed("--preset", name) == parsed(f"--preset={name}") == CampHiVeConfig.from_preset(name)
    changed = parsed("--learning-rate", 0.5, "--preset", name, "--distillation", 0.5, "--curvature", "gauss-newton")
    changes = {"learning_rate": 0.5, "distillation": 0.5, "curvature": "gauss-newton"}
    assert changed == CampHiVeConfig.from_preset(name, **changes)


def test_presets_are_offered_by_name(capsys):
    assert get_args(get_type_hints(preset_options())["preset"]) == tuple(PRESETS)
    for arguments in (["--preset", "happ"], ["--preset"]):
        with pytest.raises(SystemExit, match="2"):
            parsed(*arguments)
    assert "invalid choice: 'happ'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        parsed("--preset", "hap", "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "Recipe: sets several of the options below" in shown and "scored." in shown
    assert re.search(r"--criterion .*?\(default: hap\)", shown) and re.search(r"--merge .*?\(default: none\)", shown)


def test_patterns_are_listed_with_commas():
    config = parsed("--keep", "layer4.*, conv1", "--layer-max-ratio", "layer1.*=0.3,fc=0")
    assert config == CampHiVeConfig(keep=("layer4.*", "conv1"), layer_max_ratio={"layer1.*": 0.3, "fc": 0})
    assert parsed() == CampHiVeConfig()


# Mistakes


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


@pytest.mark.parametrize("arguments", [["--no-such-flag"], ["--cycles", "two"], ["--merge", "magic"], ["--targ", "1"]])
def test_flags_that_do_not_exist(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        prune(*arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert arguments[0] in told and told.splitlines()[-1].startswith("camphive prune: error: ")
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("arguments", [["squash"], ["--model", "digits_resnet"]])
def test_commands_that_do_not_exist(capsys, arguments):
    assert cli.main(arguments) == 2
    told = capsys.readouterr()
    assert f"there is no command '{arguments[0]}'" in told.err and "prune" in told.err and not told.out


# Help


def test_help_of_the_program(capsys):
    assert cli.main(["--help"]) == cli.main([]) == 0
    told = capsys.readouterr().out
    assert all(command in told for command in ("prune", "inspect", "evaluate", "expand", "compare"))


def help_of(capsys, command: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (
            "prune",
            "--model --dataset --target-macs --cycles --criterion --merge --epochs --output-dir --push-to-hub "
            "--hub-model-id --dry-run --resume --overwrite --seed --checkpoint",
        ),
        ("inspect", "--model --checkpoint"),
        ("evaluate", "--model --dataset --max-eval-samples"),
        ("expand", "--model --factor --groups --from --spread --seed --output-dir --overwrite"),
        (
            "compare",
            "--model --dataset --methods --merge --ratios --seeds --cycles --calibration-size --epochs --output-dir",
        ),
    ],
)
def test_help_of_a_command(capsys, command, flags):
    text = help_of(capsys, command)
    assert text.startswith(f"usage: camphive {command} [options]\n")
    listed = re.findall(r"(?<![\w-])--[\w-]+", "\n".join(line for line in text.splitlines() if line.startswith("  -")))
    assert set(flags.split()) <= set(listed)
    assert not [flag for flag in listed if "_" in flag]  # the spelling with underscores is a courtesy


def test_every_flag_of_the_help_is_understood(capsys):
    from transformers import HfArgumentParser

    parsers = []
    real = HfArgumentParser.parse_args_into_dataclasses

    def remember(self, *args, **kwargs):
        parsers.append(self)
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", remember)
        text = help_of(capsys, "prune")
    accepted = {spelling for action in parsers[0]._actions for spelling in action.option_strings}
    listed = re.findall(r"(?<![\w-])--[\w-]+", "\n".join(line for line in text.splitlines() if line.startswith("  -")))
    assert set(listed) <= accepted and len(listed) > 40
    assert {"--model_name_or_path", "--dataset_name", "--num_train_epochs", "--target_macs"} <= accepted


# The demo


@pytest.mark.parametrize("arguments", [[], ["--overwrite"], ["--output-dir", "small", "--resume"]])
def test_without_options_that_choose_the_run_is_the_demo(arguments):
    *_, config = cli._prune_arguments(arguments)
    assert config == CampHiVeConfig(**DEMO) and config.budgets == {"latency": DEMO["target_latency"]}


@pytest.mark.parametrize("option", [["--model", "digits_resnet"], ["--seed", "1"], ["--max-eval-samples", "9"]])
def test_with_an_option_that_chooses_the_usual_budget_holds(option):
    *_, config = cli._prune_arguments(option)
    assert config.budgets == {"macs": 0.5}


def test_make_demo_spells_the_demo_out():
    command = re.search(r"scripts/prune.py (.+)", (ROOT / "Makefile").read_text()).group(1).split()
    model, _, run, config = cli._prune_arguments(command)
    assert run.overwrite and model.model == BUNDLED_MODEL and config == CampHiVeConfig(**DEMO)
    assert {f"--{name.replace('_', '-')}" for name in DEMO} < set(command)


def test_the_network_of_the_demo_is_bundled_and_so_are_its_images():
    assert BUNDLED_MODEL in BUNDLED
    assert {cli._usual_dataset(name) for name in BUNDLED} == {"digits"}


# Runs


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


def test_the_script_is_the_same_job():
    arguments = [*QUICK, "--merge", "none", "--output-dir", "small"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "scripts/prune.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "MACs per image" in done.stdout and "Traceback" not in done.stderr
    found = PruneReport.from_json(Path("small", REPORT_FILE).read_text())
    assert found.command.startswith("python scripts/prune.py --calibration-size 64")
    assert str(Path.cwd()) not in found.to_json()


# Looking


def test_inspect_tells_the_truth(capsys):
    assert cli.main(["inspect", "--model", "digits_resnet"]) == 0
    told = capsys.readouterr().out
    net = load_base("digits_resnet").net
    macs, parameters = count_macs(net, (3, 16, 16)), sum(p.numel() for p in net.parameters())
    assert macs == 10_203_776
    assert f"{format_count(macs)} MACs per image, {format_count(parameters)} parameters" in told
    rows = {line.split()[0]: line.split() for line in told.splitlines() if "%" in line}
    for name in ("layer1.0.conv1", "layer3.2.conv1"):
        weight = net.get_parameter(f"{name}.weight")
        assert rows[name][1] == str(len(weight))
        both = weight.numel() + net.get_parameter(f"{name[:-1]}2.weight").numel() + 2 * len(weight)
        assert rows[name][3] == f"{both / parameters:.1%}"
        area = {"1": 256, "3": 16}[name[5]]
        first = weight.numel() + net.get_parameter(f"{name[:-1]}2.weight").numel()
        assert rows[name][2] == f"{area * first / macs:.1%}"
    assert "frozen: output of the network" in told
    bars = {name: row[4].count("█") for name, row in rows.items() if len(row) > 4}
    assert bars["layer3.2.conv1"] == 16 and bars["layer1.0.conv1"] == 16 * int(rows["layer1.0.conv1"][1]) // 64
    assert re.search("dropped whole: layer1.0, layer1.1, layer1.2", told)


def test_evaluate_tells_the_truth(capsys, saved):
    for model in ("digits_resnet", str(saved)):
        arguments = ["evaluate", "--model", model, "--dataset", "digits", "--dataloader-num-workers", "0"]
        assert cli.main([*arguments, "--max-eval-samples", "100"]) == 0
        told = capsys.readouterr().out
        found = PruneReport.from_json((saved / REPORT_FILE).read_text())
        stage = found.stages[0 if model == "digits_resnet" else -1]
        assert re.search(rf"^top-1 +{re.escape(format_share(stage.accuracy.top1))}$", told, re.M)
        assert re.search(rf"^MACs per image +{format_count(stage.footprint.macs)}$", told, re.M)
        assert "Accuracy on 100 images of '100 of 300 rows of test'" in told and "latency, batch 32" in told


def test_evaluate_on_another_number_of_classes_is_refused(capsys, tmp_path):
    pictures = [Image.fromarray(np.full((8, 8, 3), 10 * i, np.uint8)) for i in range(20)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": pictures, "label": [0, 1] * 10}, features=features)
    datasets.DatasetDict({"test": rows}).save_to_disk("two")
    assert cli.main(["evaluate", "--dataset", "two"]) == 2
    assert "the network has 10 classes, the dataset 2" in capsys.readouterr().err


# Widening


def expand(*arguments: str) -> int:
    return cli.main(["expand", *map(str, arguments)])


def test_a_widened_model_is_the_same_to_every_reader(capsys):
    assert expand("digits_resnet", "--factor", "1.5", "--output-dir", "wide") == 0
    told = capsys.readouterr()
    assert re.search(r"^layer3.2.conv1 +64 +96$", told.out, re.M) and "shards" not in told.err
    net, x = load_base("digits_resnet").net, torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    readers = [
        hf_camphive.from_pretrained("wide").timm_model,
        AutoModelForImageClassification.from_pretrained("wide").timm_model,
        timm.create_model("local-dir:wide", pretrained=True),
        load_base("wide").net,
    ]
    for wide in readers:
        assert wide.layer3[2].conv1.weight.shape[0] == 96
        with torch.no_grad():
            torch.testing.assert_close(wide.eval()(x), net(x), rtol=1e-4, atol=1e-4)
    record = json.loads(Path("wide", "expansion.json").read_text())
    assert (record["macs_before"], record["macs_after"]) == (
        count_macs(net, (3, 16, 16)),
        count_macs(wide, (3, 16, 16)),
    )
    assert "the same function in more channels" in Path("wide", "README.md").read_text()
    assert expand("digits_resnet", "--output-dir", "wide") == 2  # it holds a model
    assert expand("wide", "--groups", "layer1.0.conv1,layer1.1.conv1", "--output-dir", "wide", "--overwrite") == 0
    assert load_base("wide").net.layer1[1].conv1.weight.shape[:2] == (48, 24)


def test_bottlenecks_are_widened_from_a_report(saved):
    found = PruneReport.from_json((saved / REPORT_FILE).read_text())
    rows = tuple(replace(row, kept=row.size if row.name == "layer2.1.conv1" else 1) for row in found.groups)
    Path("first").mkdir()
    Path("first", REPORT_FILE).write_text(replace(found, groups=rows).to_json())
    assert expand("digits_resnet", "--from", "first", "--output-dir", "wide") == 0
    net, wide = load_base("digits_resnet").net, load_base("wide").net
    changed = {n for (n, a), b in zip(net.named_parameters(), wide.parameters()) if a.shape != b.shape}
    assert changed == {f"layer2.1.{n}" for n in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight")}
    assert expand(saved, "--groups", "layer3.1.conv1", "--output-dir", "again") == 0
    assert load_base("again").plans == load_base(str(saved)).plans != ()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--groups", "layer1.0.conv1", "--from", "first"], "leave one of them out"),
        (["--from", "nowhere"], "there is no nowhere/report.json; give --from the folder"),
        (["--groups", "layer1.0.conv"], "did you mean 'layer1.0.conv1'"),
        (["--factor", "0.5"], "factor is 0.5; widening needs one above 1"),
    ],
)
def test_mistakes_in_widening_leave_nothing(capsys, arguments, message):
    assert expand("digits_resnet", *arguments) == 2
    assert message in capsys.readouterr().err and not list(Path.cwd().iterdir())


# Comparisons


def compare(*arguments: str) -> int:
    quick = "--model digits_resnet --calibration-size 64 --max-eval-samples 100 --dataloader-num-workers 0 --merge none --ratios 2".split()
    return cli.main(["compare", *quick, "--methods", "magnitude", *arguments])


def test_a_comparison_prints_what_it_keeps_and_is_gone_on_with(capsys, monkeypatch):
    assert compare("--seeds", "1") == 0
    folder = Path("outputs/digits_resnet-comparison")
    told = capsys.readouterr().out
    assert (folder / "results.md").read_text() in told and f"are in {folder}" in told
    assert "| `magnitude` | `none` | 1 | 64 | **" in told
    first = json.loads((folder / "results.json").read_text())
    assert first["settings"]["dataset"] == "digits" and first["settings"]["num_train_epochs"] == 0
    assert compare("--seeds", "2") == 0
    second = json.loads((folder / "results.json").read_text())
    assert [row["cell"]["seed"] for row in second["rows"]] == [0, 1] and second["rows"][0] == first["rows"][0]
    assert compare("--learning-rate", "0.1") == 2
    assert "learning_rate: 0.005 then, 0.1 now" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "magnitud"], "no method 'magnitud'; did you mean 'magnitude'?"),
        (["--merge", "nothing"], "no merge rule 'nothing'"),
        (["--ratios", "2,three"], "--ratios is '2,three'; give numbers separated by commas"),
        (["--cycles", "1.5"], "--cycles is '1.5'; give whole numbers separated by commas"),
        (["--implant-ratio", "0.3", "--seeds", "0"], "nothing to compare"),
        (["--ratios", "0.5"], "ratio 0.5 must be above 1"),
        (["--ratios", ""], "nothing to compare"),
        (["--seeds", "0"], "nothing to compare"),
        (["--calibration-size", "5000"], "lower it"),
        (["--streaming", "--epochs", "1"], "add --max-train-samples, or --epochs 0"),
    ],
)
def test_comparisons_that_cannot_work(capsys, arguments, message):
    assert compare(*arguments) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(Path.cwd().iterdir())
