"""Dispatch, exit codes and `--help`; the script is the same job as the command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli import QUICK, help_of, prune

from hf_camphive.cli import main as cli
from hf_camphive.hub.report import REPORT_FILE, PruneReport

ROOT = Path(__file__).parents[2]


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


def test_help_of_the_program(capsys):
    assert cli.main(["--help"]) == cli.main([]) == 0
    told = capsys.readouterr().out
    assert all(command in told for command in ("prune", "inspect", "evaluate", "expand", "compare"))


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


@pytest.mark.slow
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
