"""Commands of the command line with few images, and what a refusal leaves behind."""

from pathlib import Path

import pytest

from hf_camphive.cli import main as cli

QUICK = "--calibration-size 64 --epochs 0 --polish-steps 0 --max-train-samples 256 --max-eval-samples 100 --mixed-precision no".split()
QUICK += ["--model", "digits_resnet"]


def prune(*arguments: str) -> int:
    return cli.main(["prune", *QUICK, "--dataloader-num-workers", "0", *map(str, arguments)])


def expand(*arguments: str) -> int:
    return cli.main(["expand", *map(str, arguments)])


def compare(*arguments: str) -> int:
    quick = "--model digits_resnet --calibration-size 64 --max-eval-samples 100 --dataloader-num-workers 0 --merge none --ratios 2".split()
    return cli.main(["compare", *quick, "--methods", "magnitude", *arguments])


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The message of a run that must fail and leave the working folder as it was."""
    before = snapshot(Path.cwd())
    assert prune(*arguments) == 2
    assert snapshot(Path.cwd()) == before
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def help_of(capsys: pytest.CaptureFixture, command: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out
