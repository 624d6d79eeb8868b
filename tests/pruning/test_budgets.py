"""Budgets over several cycles against numbers worked out by hand; no network in sight."""

from dataclasses import replace

import pytest
from support.chains import chain, config

from hf_camphive.core.errors import PlanError
from hf_camphive.core.plan import Budget, ChannelGroup, PrunePlan, Slot
from hf_camphive.pruning.planning.budgets import absolute, dense_sizes, is_finished, next_targets, overall_budgets


def plan(*budgets: Budget, groups: tuple[ChannelGroup, ...] = ()) -> PrunePlan:
    return PrunePlan(groups, (), (), (), "magnitude", "none", 800, 200, budgets)


def macs(before: float, target: float, after: float) -> Budget:
    return Budget("macs", before, target, after)


def narrow(width: int):
    """1 -> width -> 1: 2 * width MACs per image."""
    return chain(1, width, 1)


def test_shares_are_of_the_dense_network_and_numbers_stand_for_themselves():
    dense = {"macs": 300, "params": 4000, "latency": 8.0}
    assert absolute({"macs": 0.5, "params": 1000, "latency": 0.25}, dense) == {
        "macs": 150,
        "params": 1000,
        "latency": 2.0,
    }
    assert absolute({"macs": 1, "params": 1.0, "latency": 1.0}, dense) == {
        "macs": 300,
        "params": 4000,
        "latency": 1.0,  # a millisecond, where the others are all that there is
    }


@pytest.mark.parametrize(
    ("cycles", "done", "width", "expected"),
    [
        (1, 0, 400, 50),
        (2, 0, 400, 200),  # 800 (1/16)^(1/2)
        (4, 0, 400, 400),  # 800 (1/16)^(1/4)
        (3, 1, 100, 100),  # 200 (1/4)^(1/2): the share is of what there is now
        (2, 1, 100, 50),
        (3, 1, 20, 50),  # 40 MACs: met already
    ],
)
def test_every_cycle_leaves_the_same_share_of_what_is_left(cycles, done, width, expected):
    settings = config(target_macs=1 / 16, cycles=cycles)
    earlier = [plan(macs(800, 200, 200))] * done
    assert next_targets(narrow(width), earlier, settings) == {"macs": pytest.approx(expected, rel=1e-12)}


def test_each_cost_has_a_target_of_its_own():
    network = replace(narrow(400), parameters=frozenset({"conv0.weight"}))
    settings = config(target_macs=0.25, target_params=0.5, cycles=2)
    assert next_targets(network, [], settings) == pytest.approx({"macs": 400, "params": 400 / 2**0.5})


def test_budgets_that_ask_for_nothing_or_too_much_are_refused():
    with pytest.raises(PlanError, match="of 1,000 MACs per image is no less than the network's 800 MACs"):
        next_targets(narrow(400), [], config(target_macs=1000))
    with pytest.raises(PlanError, match=r"of 1 MACs per image \(0\.1%\) is below .* allow, 2 .* \(0\.2%\); raise tar"):
        next_targets(narrow(400), [], config(target_macs=1 / 800))
    with pytest.raises(PlanError, match=r"allow, 6 .* \(0\.8%\); raise target_macs, or raise the ratio limits"):
        next_targets(narrow(400), [], config(target_macs=1 / 800, max_ratio=0.994))


def test_a_run_is_judged_from_its_first_network_to_its_last():
    settings = config(target_macs=1 / 16, target_params=30_000, cycles=3)
    first = plan(macs(800, 300, 290), Budget("params", 90_000, 60_000, 59_000))
    second = plan(macs(290, 130, 40), Budget("params", 59_000, 40_000, 31_000))
    assert overall_budgets([first, second], settings) == (
        macs(800, 50, 40),
        Budget("params", 90_000, 30_000, 31_000),
    )
    assert overall_budgets([], settings) == overall_budgets([plan()], settings) == ()


def test_a_run_ends_with_its_cycles_or_once_all_budgets_are_met():
    settings = config(target_macs=1 / 16, cycles=3)
    missed, met = plan(macs(800, 300, 51)), plan(macs(800, 300, 50))
    assert not is_finished([], settings)
    assert not is_finished([missed], settings) and not is_finished([missed] * 2, settings)
    assert is_finished([missed] * 3, settings)
    assert is_finished([met], settings)
    assert is_finished([plan()], settings)  # without budgets nothing is left to do


def test_dense_widths_are_found_by_place_where_the_first_layer_has_gone():
    def at(tensor: str, size: int) -> Slot:
        return Slot(tensor, 0, "producer", tuple(range(size)))

    before = ChannelGroup("stem", 16, (at("stem.weight", 16), at("block.weight", 16)))
    now = ChannelGroup("block", 6, (at("block.weight", 6),))
    new = ChannelGroup("other", 3, (at("other.weight", 3),))
    assert dense_sizes((now, new), [plan(groups=(before,)), plan(groups=(now,))]) == {"block": 16}
    assert dense_sizes((now, new), []) == {"block": 6, "other": 3}
