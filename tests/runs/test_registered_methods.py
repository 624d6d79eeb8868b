"""A criterion from outside the package does the main job: config, command line, run, card."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.brief import skip_folding, time_briefly
from support.runs import CONFIG, pruned

import hf_camphive
from hf_camphive.cli import main as cli
from hf_camphive.core import methods
from hf_camphive.core.errors import ConfigError
from hf_camphive.pruning.scoring import criteria

NAME, WORDING = "heaviest-first", "the negative norm of the weights that read the channel"


def heaviest_first(context):
    """What a user would write; by another criterion's scores, so that the outcome is known."""
    return {name: -scores for name, scores in criteria.magnitude(context).items()}


@pytest.fixture
def registered():
    hf_camphive.register_criterion(NAME, heaviest_first, wording=WORDING, source="nobody, 1999", reads_images=False)
    yield NAME
    del methods.CRITERIA[NAME], criteria.SCORERS[NAME]


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    time_briefly(monkeypatch)
    skip_folding(monkeypatch)


def test_a_criterion_from_outside_does_the_main_job(registered, tmp_path):
    config = replace(CONFIG, criterion=registered, merge="none", target_macs=0.7)
    job = pruned(config)
    (plan,) = job.plans
    assert plan.criterion == NAME and plan.cuts
    for cut in plan.cuts:
        scores = job.scores[cut.group]
        assert (scores < 0).all() and set(cut.keep) == set(scores.argsort(descending=True)[: len(cut.keep)].tolist())
    folder = job.save_pretrained(tmp_path / "small")
    assert f"Channels were ranked by {WORDING} (nobody, 1999), per MAC saved" in (folder / "README.md").read_text()
    assert hf_camphive.CampHiVeConfig.from_pretrained(folder) == config


def test_the_command_line_knows_it(registered, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = "--calibration-size 8 --merge none --epochs 0 --polish-steps 0 --max-eval-samples 50".split()
    assert cli.main(["prune", *options, "--dry-run", "--criterion", NAME, "--output-dir", "small"]) == 0
    assert json.loads(Path("small/prune_plan.json").read_text())["cycles"][0]["criterion"] == NAME
    with pytest.raises(SystemExit):
        cli.main(["prune", "--help"])
    assert NAME in capsys.readouterr().out


def test_what_was_registered_is_gone_again():
    with pytest.raises(ConfigError, match=f"criterion is '{NAME}'"):
        replace(CONFIG, criterion=NAME)


def test_a_name_is_registered_once(registered):
    with pytest.raises(ConfigError, match="is taken"):
        hf_camphive.register_criterion(NAME, heaviest_first, wording="again")
    with pytest.raises(ConfigError, match="is taken"):
        hf_camphive.register_criterion("fisher", heaviest_first, wording="again")
    assert criteria.SCORERS["fisher"] is criteria.fisher
