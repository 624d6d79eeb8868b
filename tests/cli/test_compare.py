"""A comparison prints what it keeps, and goes on with what was interrupted."""

import json
from pathlib import Path

import pytest
from support.cli import compare


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
