"""torch-pruning as a method: its plan is what it did, at the MACs that were asked for, or it is refused."""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import PlanError
from hf_camphive.core.plan import ChannelCut
from hf_camphive.network.footprint import count_macs
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.runs.comparison import Problem
from hf_camphive.runs.pruner import CampHiVePruner
from hf_camphive.training.data.calibration import Calibration

pytest.importorskip("torch_pruning", reason='needs pip install "hf_camphive[benchmarks]"')
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import torch_pruning_peer as peer


@pytest.fixture(scope="module")
def problem() -> Problem:
    pruner = CampHiVePruner("digits_resnet", CampHiVeConfig(target_macs=0.5))
    _, targets = pruner.cycle.next_targets()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, *pruner.input_size, generator=generator)
    batches = [{"pixel_values": images, "labels": torch.arange(32) % 10}]
    return Problem(
        pruner.net, pruner.cycle.analysis.trace, Calibration.collect(batches), int(targets["macs"]), pruner.config
    )


def own(problem):
    return replace(problem, net=copy.deepcopy(problem.net))


@pytest.mark.parametrize("method", ["tp-taylor", "tp-group-norm-all"])
def test_the_plan_reaches_the_target_on_the_groups_that_it_may_cut(problem, method):
    plan = peer.methods()[method](own(problem))
    small = apply_plan(problem.net, plan, problem.trace)
    assert plan.macs_after == count_macs(small, problem.trace.input_size)
    assert 0.99 <= plan.macs_after / problem.target_macs < 1.01
    cut = {group for group in plan.keep if len(plan.keep[group]) < dict(sizes(problem))[group]}
    exterior = peer.exterior_groups(problem.trace)
    assert bool(cut & exterior) is method.endswith("-all") and cut - exterior
    assert all(p.grad is None for p in problem.net.parameters())


def sizes(problem):
    return [(group.name, group.size) for group in problem.trace.groups]


def test_the_least_of_the_first_layers_norm_goes_first(problem):
    """One channel less by hand: the least filter norm, relative to the mean of its layer, of all interior groups."""
    exterior = peer.exterior_groups(problem.trace)
    groups = [g for g in problem.trace.groups if not g.frozen and g.name not in exterior]
    weights = dict(problem.net.named_parameters())
    norms = {g.name: weights[f"{g.name}.weight"].detach().square().flatten(1).sum(1) for g in groups}
    relative = {(name, c): float(v / norm.mean()) for name, norm in norms.items() for c, v in enumerate(norm)}
    name, channel = min(relative, key=relative.__getitem__)
    total = sum(group.size for group in groups)
    ignored = list(peer._ignored(problem, interior=True))
    pruned = peer._prune(problem, peer.IMPORTANCES["magnitude"](), ignored, 0.9 / total)
    keep = peer._on_groups(problem.trace.groups, pruned.removed)
    size = dict(sizes(problem))[name]
    assert keep == {name: tuple(c for c in range(size) if c != channel)}


def test_layers_that_disagree_are_refused(problem):
    group = next(g for g in problem.trace.groups if not g.frozen and g.consumers())
    producer = next(slot for slot in group.slots if slot.role == "producer")
    with pytest.raises(PlanError, match=f"coupled with it in group '{group.name}'"):
        peer._on_groups(problem.trace.groups, {(producer.tensor, 0): {0}})
    with pytest.raises(PlanError, match="belong to none of our channel groups"):
        peer._on_groups(problem.trace.groups, {("nowhere.weight", 0): {0}})


def test_another_function_is_refused(problem):
    plan = peer.methods()["tp-magnitude"](own(problem))
    first, *rest = plan.cuts
    other = ChannelCut(first.group, first.keep[1:])
    with pytest.raises(PlanError, match="not ours with the same channels masked"):
        peer._check_same_function(
            problem, replace(plan, cuts=(other, *rest)), apply_plan(problem.net, plan, problem.trace)
        )


def test_the_search_takes_what_is_nearest_and_not_below():
    def stairs(ratio):
        return peer.Pruned(None, {}, 1000 - 100 * int(10 * ratio))

    assert peer._search(600, stairs).macs == 600
    assert peer._search(590, stairs).macs == 600  # 1.7 % above, where the steps are 17 % wide
    with pytest.raises(PlanError, match=r"650 MACs per image were asked for.*700 at best"):
        peer._search(650, stairs)
