"""Methods from outside the package do the main job; and a network is analysed once, whatever is asked of it."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.brief import time_briefly
from support.runs import CONFIG, digits, pruned
from support.toys import randomise
from torch import nn

import hf_camphive
from hf_camphive.cli import main as cli
from hf_camphive.core import methods
from hf_camphive.core.errors import ConfigError
from hf_camphive.network import analysis as analysis_module
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.graph import handlers, program
from hf_camphive.network.surgery.cutting import mask_state
from hf_camphive.pruning.merging import rules
from hf_camphive.pruning.planning import budgets
from hf_camphive.pruning.scoring import criteria
from hf_camphive.runs.pruner import CampHiVePruner

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


def halved(task):
    """A merge rule: plain removal, with half of each kept column."""
    state = mask_state(task.state, task.plan)
    for group in task.plan.groups:
        for slot in group.consumers() if len(task.plan.keep[group.name]) < group.size else ():
            state[slot.tensor] = 0.5 * state[slot.tensor]
    return state


@pytest.fixture
def rule():
    hf_camphive.register_merge_rule("halved", halved, wording="what stayed was halved")
    yield "halved"
    del methods.MERGE_RULES["halved"], rules.MERGERS["halved"]


@pytest.mark.slow
def test_a_merge_rule_from_outside_does_the_main_job(rule, tmp_path):
    job = pruned(replace(CONFIG, criterion="magnitude", merge=rule, target_macs=0.7))
    plain = pruned(replace(CONFIG, criterion="magnitude", merge="none", target_macs=0.7))
    assert job.plans[0].cuts == plain.plans[0].cuts
    cut = job.plans[0].cuts[0].group
    reader = next(slot.tensor for slot in next(g for g in job.plans[0].groups if g.name == cut).consumers())
    found, expected = (dict(net.named_parameters())[reader] for net in (job.net, plain.net))
    assert torch.equal(found, 0.5 * expected)
    assert "what stayed was halved" in (job.save_pretrained(tmp_path / "small") / "README.md").read_text()


class Strange(nn.Module):
    """A network with an operation that tracing does not know: logit, element by element."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.two(torch.logit(self.one(x).sigmoid(), eps=1e-3)).mean((2, 3)))


@pytest.fixture
def operation():
    hf_camphive.register_operation("logit", lambda labels, node: labels.of(node.args[0]))
    yield "logit"
    del handlers.HANDLERS["logit"]


def test_an_unknown_operation_freezes_its_channels():
    frozen = {group.name: group.frozen for group in NetworkAnalysis.of(randomise(Strange()), (3, 8, 8)).groups}
    assert "logit" in frozen["one"] and "is not understood" in frozen["one"]


def test_an_operation_from_outside_frees_them(operation):
    analysis = NetworkAnalysis.of(randomise(Strange()), (3, 8, 8))
    assert {group.name: group.frozen for group in analysis.groups}["one"] is None


def test_an_operation_is_taught_once(operation):
    for taken in ("conv2d", operation):
        with pytest.raises(ConfigError, match=f"'{taken}' has a handler already"):
            hf_camphive.register_operation(taken, lambda labels, node: None)


def test_a_network_is_analysed_once(monkeypatch):
    """A plan, its trials, the merge and the cut all read one analysis; only the next network gets another."""
    counts = Counter()

    def counted(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, **k: (counts.update([name]), real(*a, **k))[1])

    counted(analysis_module, "trace_network")
    counted(analysis_module, "check_groups")
    counted(analysis_module, "droppable_branches")
    counted(analysis_module, "exterior_groups")
    counted(budgets, "smallest")
    before = program.Ancestry.__init__

    def built(self, traced):
        counts.update(["ancestry"])
        before(self, traced)

    monkeypatch.setattr(program.Ancestry, "__init__", built)
    config = replace(CONFIG, calibration_size=128, early_weight=None)
    job = CampHiVePruner("digits_resnet", config)
    job.check_budget()
    images = digits(job.base.net, config).calibration
    plan = job.plan(images)
    job.apply(plan, images)
    once = ("trace_network", "check_groups", "droppable_branches", "exterior_groups", "smallest", "ancestry")
    assert counts == dict.fromkeys(once, 1)
