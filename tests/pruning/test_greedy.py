"""The greedy descent against arithmetic done by hand, and budgets against floors; no network in sight."""

import random
from dataclasses import replace
from math import prod

import pytest
import torch
from support.chains import chain, config, group

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError, PlanError
from hf_camphive.core.plan import Branch, ChannelGroup, Slot
from hf_camphive.pruning.merging.rules import cyclic_pairs
from hf_camphive.pruning.planning.costs import CostModel, CostTerm, Width
from hf_camphive.pruning.planning.greedy import make_plan, smallest


def least_macs(network: CostModel, settings: CampHiVeConfig) -> int:
    return smallest(network, ["macs"], settings)["macs"]


def residual(inner: tuple[int, int] = (2, 3), stream: int = 4) -> CostModel:
    """stem -> stream; block: stream -> a -> b -> stream, whose gates are a and b; head reads the stream."""
    a, b = inner
    shapes = {
        "stem.weight": (stream, 3, 1, 1),
        "block.conv1.weight": (a, stream, 1, 1),
        "block.conv2.weight": (b, a, 1, 1),
        "block.conv3.weight": (stream, b, 1, 1),
        "head.weight": (5, stream),
    }
    slots = (
        *(Slot(f"{name}.weight", 0, "producer", tuple(range(stream))) for name in ("stem", "block.conv3")),
        *(Slot(f"{name}.weight", 1, "consumer", tuple(range(stream))) for name in ("block.conv1", "head")),
    )
    groups = (
        ChannelGroup("stream", stream, slots),
        group("a", a, "block.conv1", "block.conv2"),
        group("b", b, "block.conv2", "block.conv3"),
    )
    tensors = tuple(name for name in shapes if "block" in name)
    branch = Branch("block", (), (), ("a", "b"), ("a", "b"), tensors, "add", "out")
    return CostModel(groups, (branch,), frozenset({"stream"}), dict.fromkeys(shapes, 10), shapes)


def macs(network: CostModel, kept: dict[str, int]) -> int:
    """MACs of a network from its widths alone, by another road than the descent's differences."""
    shapes = {name: list(shape) for name, shape in network.shapes.items()}
    for g in network.groups:
        for slot in g.slots:
            if slot.tensor in shapes:
                shapes[slot.tensor][slot.axis] -= (g.size - kept.get(g.name, g.size)) * (len(slot.index) // g.size)
    return sum(count * prod(shapes[name]) for name, count in network.positions.items())


def widths(plan) -> dict[str, int]:
    return {name: len(channels) for name, channels in plan.keep.items()}


def random_scores(network: CostModel, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.size, generator=generator).square() for g in network.groups}


# The budget


@pytest.mark.parametrize("seed", range(40))
def test_the_budget_is_met_within_one_channel_and_never_exceeded(seed):
    chance = random.Random(seed)
    sizes = [chance.randint(2, 40) for _ in range(chance.randint(3, 7))]
    network = chain(
        *sizes, positions=tuple(chance.choice([1, 49, 196]) for _ in sizes[1:]), kernel=chance.choice([1, 3])
    )
    settings = config(min_channels=chance.choice([1, 2]), round_to=chance.choice([1, 1, 2]))
    least = least_macs(network, settings)
    for _ in range(10):
        target = chance.randint(least, network.macs - 1)
        plan = make_plan(network, random_scores(network, chance.randrange(10**6)), target, settings)
        kept = widths(plan)
        assert plan.macs_before == macs(network, {}) == network.macs
        assert least <= plan.macs_after == macs(network, kept) <= target
        back = []
        for cut in plan.cuts:
            size = next(g.size for g in network.groups if g.name == cut.group)
            step = settings.round_to if kept[cut.group] + settings.round_to <= size else size - kept[cut.group]
            back.append(macs(network, kept | {cut.group: kept[cut.group] + step}))
        assert max(back) > target


def test_the_least_important_channels_of_a_group_go():
    network = chain(3, 6, 2)
    scores = {"g1": torch.tensor([5.0, 1.0, 4.0, 0.5, 3.0, 2.0])}
    plan = make_plan(network, scores, 20, config())
    assert plan.keep["g1"] == (0, 2, 4, 5)  # 5 MACs a channel: 30 -> 20 takes two


def test_a_global_threshold_looks_at_scores_alone():
    # the network of the next test: what is left after one, two, ... removals in order of score
    network = chain(2, 4, 3, 1, positions=(10, 1, 1))
    scores = {"g1": torch.tensor([9.2, 2.3, 6.9, 30.0]), "g2": torch.tensor([4.0, 1.0, 8.0])}
    for target, expected in (
        (94, {"g2": (0, 2)}),
        (89, {"g1": (0, 2, 3), "g2": (0, 2)}),
        (67, {"g1": (0, 2, 3), "g2": (2,)}),
    ):
        plan = make_plan(network, scores, target, config(threshold="global"))
        assert {cut.group: cut.keep for cut in plan.cuts} == expected


def test_a_percentile_takes_the_same_share_of_every_group():
    network = chain(2, 10, 20, 1, positions=(10, 1, 1))
    scores = {name: values * 1000 ** int(name[1]) for name, values in random_scores(network, 0).items()}
    for target in (300, 150, 60):
        plan = make_plan(network, scores, target, config(threshold="percentile"))
        kept = widths(plan)
        assert abs(kept["g1"] / 10 - kept["g2"] / 20) <= 0.1
        for name, size in (("g1", 10), ("g2", 20)):
            assert plan.keep[name] == tuple(sorted(scores[name].argsort()[size - kept[name] :].tolist()))


def test_a_threshold_is_passed_by_a_whole_branch_or_not_at_all():
    """Emptying a drops b with it; a global threshold asks that the highest score of all of them be passed."""
    network = residual()
    scores = {"stream": torch.full((4,), 5.0), "a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 9.0, 4.0])}
    plan = make_plan(network, scores, least_macs(network, config()), config(threshold="global"))
    assert plan.dropped == ("block",) and plan.keep["stream"] == (3,)
    some = make_plan(network, scores, macs(network, {"a": 1, "b": 1}), config(threshold="global"))
    assert some.dropped == () and some.keep["a"] == (1,) and some.keep["b"] == (1,)


def test_removal_order_by_hand():
    # conv0 [4, 2] at 10 positions, conv1 [3, 4] at 1, conv2 [1, 3] at 1: 80 + 12 + 3 = 95 MACs.
    # A channel of g1 saves 2 * 10 + 3 = 23, one of g2 saves 4 + 1 = 5, so that per MAC saved
    #   g1: 2.3 / 23 = 0.1, then 6.9 / 23 = 0.3 ...      g2: 1.0 / 5 = 0.2, then 4.0 / 5 = 0.8 ...
    network = chain(2, 4, 3, 1, positions=(10, 1, 1))
    scores = {"g1": torch.tensor([9.2, 2.3, 6.9, 30.0]), "g2": torch.tensor([4.0, 1.0, 8.0])}
    assert network.macs == 95
    first = make_plan(network, scores, 72, config())
    assert (first.keep["g1"], first.keep["g2"], first.macs_after) == ((0, 2, 3), (0, 1, 2), 72)
    # With three channels left in g1, one of g2 saves 3 + 1 = 4: 1.0 / 4 = 0.25, still less than g1's 0.3.
    second = make_plan(network, scores, 68, config())
    assert (second.keep["g1"], second.keep["g2"], second.macs_after) == ((0, 2, 3), (0, 2), 68)
    # Now g1 saves 20 + 2 = 22: 6.9 / 22 = 0.31 against 4.0 / 4 = 1.
    third = make_plan(network, scores, 46, config())
    assert (third.keep["g1"], third.keep["g2"], third.macs_after) == ((0, 3), (0, 2), 46)


def test_costs_are_those_of_the_widths_that_are_left():
    # At full width a channel of g2 saves 8 + 1 = 9, per MAC 0.8 / 9 = 0.089; g1's first six are free and go first.
    # After them g2's saves 2 + 1 = 3: 0.8 / 3 = 0.27, more than 1.0 / 4 = 0.25 of g1's seventh (1 + 3 MACs).
    network = chain(1, 8, 3, 1)
    scores = {"g1": torch.tensor([0.0] * 6 + [1.0, 9.0]), "g2": torch.tensor([0.8, 5.0, 6.0])}
    assert network.macs == 8 + 24 + 3
    assert widths(make_plan(network, scores, 11, config())) == {"g1": 2, "g2": 3}
    plan = make_plan(network, scores, 7, config())
    assert widths(plan) == {"g1": 1, "g2": 3} and plan.macs_after == 7


def test_positions_per_channel_count():
    # A head that reads 4 positions of each channel: a channel saves 3 + 2 * 4 = 11.
    shapes = {"conv.weight": (5, 3, 1, 1), "head.weight": (2, 20)}
    network = CostModel((group("g", 5, "conv", "head", repeat=4),), (), frozenset(), dict.fromkeys(shapes, 1), shapes)
    plan = make_plan(network, {"g": torch.arange(5.0)}, 54, config())
    assert (plan.macs_before, plan.macs_after, plan.keep["g"]) == (55, 44, (1, 2, 3, 4))


def test_a_tensor_that_carries_a_group_on_both_axes():
    slots = (
        Slot("in.weight", 0, "producer", (0, 1, 2)),
        Slot("square.weight", 0, "producer", (0, 1, 2)),
        Slot("square.weight", 1, "consumer", (0, 1, 2)),
    )
    shapes = {"in.weight": (3, 1), "square.weight": (3, 3)}
    network = CostModel((ChannelGroup("g", 3, slots),), (), frozenset(), dict.fromkeys(shapes, 1), shapes)
    plan = make_plan(network, {"g": torch.arange(3.0)}, 11, config())
    assert (plan.macs_before, plan.macs_after) == (12, 2 + 4)


def test_ties_are_settled_by_order():
    network = chain(4, 6, 6, 4)
    even = {"g1": torch.ones(6), "g2": torch.ones(6)}
    plans = [make_plan(network, scores, 60, config()) for scores in (even, even, dict(reversed(even.items())))]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].keep["g1"] == tuple(range(6 - len(plans[0].keep["g1"]), 6))


def test_the_plan_says_by_what_it_was_made():
    plan = make_plan(chain(3, 6, 2), {"g1": torch.arange(6.0)}, 20, config(criterion="taylor", merge="nearest"))
    assert (plan.criterion, plan.merge, plan.dropped) == ("taylor", "nearest", ())
    assert plan.groups == chain(3, 6, 2).groups


# Floors


@pytest.mark.parametrize("least", [1, 2, 5, 7])
def test_no_group_goes_below_its_floor(least):
    network = chain(3, 10, 6, 2)
    settings = config(min_channels=least)
    target = least_macs(network, settings)
    plan = make_plan(network, random_scores(network, 0), target, settings)
    assert widths(plan) == {"g1": least, "g2": min(least, 6)}
    assert plan.macs_after == target == macs(network, {"g1": least, "g2": min(least, 6)})


def test_widths_are_multiples():
    network = chain(3, 20, 16, 7, 2)
    settings = config(round_to=8)
    for share in (0.9, 0.7, 0.5):
        plan = make_plan(network, random_scores(network, 1), int(share * network.macs), settings)
        assert all(width % 8 == 0 or width == {"g1": 20, "g3": 7}.get(name) for name, width in widths(plan).items())
    assert widths(make_plan(network, {}, least_macs(network, settings), settings)) == {"g1": 8, "g2": 8, "g3": 7}


@pytest.mark.parametrize("settings", [config(), config(round_to=4, min_channels=3), CampHiVeConfig()], ids=str)
@pytest.mark.parametrize("network", [residual(), residual((5, 4), 8)], ids=["small", "large"])
def test_the_error_states_the_smallest_that_can_be_reached(network, settings):
    least = least_macs(network, settings)
    with pytest.raises(PlanError) as caught:
        make_plan(network, random_scores(network, 3), least - 1, settings)
    message = str(caught.value)
    assert f"the smallest that can be reached is {least:,} ({least / network.macs:.1%}); raise target_macs" in message
    assert ("set scope to all" in message) == (settings.scope == "interior")
    assert make_plan(network, random_scores(network, 3), least, settings).macs_after == least


def test_a_budget_that_is_met_already():
    network = chain(3, 6, 2)
    with pytest.raises(PlanError, match="already has 30 MACs per image, the budget is 30; lower target_macs"):
        make_plan(network, {}, 30, config())


def test_frozen_groups_stay():
    network = chain(3, 6, 6, 2)
    frozen = (ChannelGroup("g1", 6, network.groups[0].slots, "its output is returned"), network.groups[1])
    network = CostModel(frozen, (), frozenset(), network.positions, network.shapes)
    plan = make_plan(network, {}, least_macs(network, config()), config())
    assert widths(plan) == {"g1": 6, "g2": 1}


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), r"\(it has none\)"),
        ((group("g1", 6, "conv0", "conv1", "output of the network"),), r"\(g1: output of the network\)"),
    ],
)
def test_nothing_to_prune(groups, message):
    network = chain(3, 6, 2)
    network = CostModel(groups, (), frozenset(), network.positions, network.shapes)
    for work in (lambda: make_plan(network, {}, 10, config()), lambda: least_macs(network, config())):
        with pytest.raises(
            PlanError, match=f"no channel group of this network can be pruned {message}; choose another"
        ):
            work()


# Blocks and branches


def test_interior_scope_leaves_what_lies_between_blocks():
    network = residual()
    interior = make_plan(network, {}, least_macs(network, CampHiVeConfig()), CampHiVeConfig())
    assert interior.keep["stream"] == (0, 1, 2, 3) and interior.dropped == ("block",)
    everything = make_plan(network, {}, least_macs(network, config()), config())
    assert len(everything.keep["stream"]) == 1
    assert least_macs(network, CampHiVeConfig()) == 10 * (4 * 3 + 5 * 4)  # stem and head alone
    assert least_macs(network, config()) == 10 * (1 * 3 + 5 * 1)


def test_an_emptied_gate_drops_its_branch_and_all_groups_of_it():
    # a has two worthless channels; b's three are dear. Emptying a loses b's scores as well, and saves the whole branch.
    network = residual()
    scores = {"stream": torch.full((4,), 1e9), "a": torch.zeros(2), "b": torch.tensor([3.0, 2.0, 1.0])}
    first = make_plan(network, scores, network.macs - 1, config())
    assert widths(first) == {"stream": 4, "a": 1, "b": 3} and first.dropped == ()
    plan = make_plan(network, scores, first.macs_after - 50, config())
    # b's cheapest: 1.0 / 10 (1 + 4); dropping all: 6.0 / 10 (4 + 3 + 12). 0.02 < 0.032: b goes first.
    assert widths(plan) == {"stream": 4, "a": 1, "b": 2}
    scores["b"] = torch.tensor([1.0, 1.0, 1.0])  # 3.0 / 190 = 0.0158 < 1.0 / 50
    plan = make_plan(network, scores, first.macs_after - 190, config())
    assert widths(plan) == {"stream": 4, "a": 0, "b": 0} and plan.dropped == ("block",)
    assert plan.macs_after == 10 * (4 * 3 + 5 * 4) == macs(network, widths(plan))


def test_min_channels_is_no_floor_of_a_gate():
    settings = config(min_channels=2)
    plan = make_plan(residual(), {}, least_macs(residual(), settings), settings)
    assert widths(plan) == {"stream": 2, "a": 0, "b": 0}


@pytest.mark.parametrize("seed", range(20))
def test_budgets_with_branches_are_never_exceeded(seed):
    chance = random.Random(seed)
    network = residual((chance.randint(1, 9), chance.randint(1, 9)), chance.randint(2, 9))
    settings = config(round_to=chance.choice([1, 1, 2]))
    for _ in range(10):
        target = chance.randint(least_macs(network, settings), network.macs - 1)
        plan = make_plan(network, random_scores(network, chance.randrange(10**6)), target, settings)
        kept = widths(plan)
        assert plan.macs_after == macs(network, kept) <= target
        assert (plan.dropped == ("block",)) == (kept["a"] == 0) == (kept["b"] == 0)


# Several costs, staircases and whole branches


def timed(network: CostModel, *parts: CostTerm) -> CostModel:
    return replace(network, operations=parts)


def stairs(group: str, step: int, ms: float = 1.0) -> CostTerm:
    """An operation that takes `ms` for each started `step` channels of a group."""
    return CostTerm((Width(0, ((group, 1),)),), lambda width: ms * -(-width // step))


def latency_plan(network: CostModel, scores: dict, target: float, **changes):
    return make_plan(network, scores, {"latency": target}, config(target_latency=target, **{"round_to": 1} | changes))


def test_steps_that_save_no_time_are_looked_past():
    # g1 takes 1 ms for each started four channels: three channels of g1 save nothing, the fourth saves all.
    network = timed(chain(1, 8, 8, 1), stairs("g1", 4), stairs("g2", 8, 0.5))
    scores = {"g1": torch.full((8,), 0.1), "g2": torch.full((8,), 0.1)}
    plan = latency_plan(network, scores, 1.5)
    assert widths(plan)["g1"] <= 4 and widths(plan)["g2"] == 8
    (budget,) = plan.budgets
    assert (budget.cost, budget.before, budget.target, budget.after) == ("latency", 2.5, 1.5, 1.5)


def test_latency_plans_keep_multiples_of_eight_unless_told_otherwise():
    network = timed(chain(1, 32, 32, 1), stairs("g1", 1), stairs("g2", 1))
    scores = random_scores(network, 0)
    plan = make_plan(network, scores, {"latency": 40}, config(target_latency=40.0))
    assert all(width % 8 == 0 for width in widths(plan).values())


def test_a_branch_goes_whole_where_its_fixed_cost_makes_that_cheaper():
    # Channel by channel, the stream's (1.5 a ms) are cheaper than the branch's (2 a ms); the branch whole has 10 ms more.
    parts = stairs("stream", 1), stairs("a", 1), stairs("b", 1)
    network = residual(stream=12)
    scores = {"stream": torch.full((12,), 1.5), "a": torch.full((2,), 2.0), "b": torch.full((3,), 2.0)}
    plan = latency_plan(
        timed(network, *parts, CostTerm((), lambda: 10.0, "block")), scores, 18.0
    )  # 10 / 9 against 1.5
    assert plan.dropped == ("block",) and widths(plan)["stream"] == 12 and plan.budgets[0].after == 12
    plan = latency_plan(timed(network, *parts), scores, 8.0)  # without that, 2 a ms: the stream goes
    assert plan.dropped == () and widths(plan) == {"stream": 3, "a": 2, "b": 3}


def test_all_budgets_are_met_and_those_met_count_no_more():
    network = replace(chain(2, 10, 10, 1), parameters=frozenset({"conv0.weight", "conv1.weight"}))
    for seed in range(5):
        targets = {"macs": 0.5 * network.macs, "params": 0.3 * network.costs()["params"]}
        plan = make_plan(network, random_scores(network, seed), targets, config())
        assert [budget.cost for budget in plan.budgets] == ["macs", "params"]
        assert all(budget.after <= budget.target for budget in plan.budgets)
    # MACs are met from the start: only what saves parameters counts, though g3 saves MACs at less loss.
    network = replace(chain(2, 4, 1, 4, 1), parameters=frozenset({"conv0.weight"}))
    scores = {"g1": torch.ones(4), "g2": torch.ones(1), "g3": torch.zeros(4)}
    plan = make_plan(network, scores, {"macs": network.macs, "params": 6}, config())
    assert widths(plan) == {"g1": 3, "g2": 1, "g3": 4}


def test_parameters_of_a_dropped_branch_leave_a_constant():
    network = residual()
    network = replace(network, parameters=frozenset(network.shapes))
    before = network.costs()["params"]
    assert before == 12 + 8 + 6 + 12 + 20
    plan = make_plan(network, {"stream": torch.full((4,), 1e9)}, {"params": 36}, config(target_params=0.5))
    assert plan.dropped == ("block",) and plan.budgets[0].after == 12 + 20 + 4


def test_latency_out_of_reach():
    network = timed(chain(1, 8, 8, 1), stairs("g1", 1))
    with pytest.raises(
        PlanError, match=r"budget of 0.5 ms per batch \(6.2%\) cannot be met: .* is 1 ms per batch \(12.5%\)"
    ):
        latency_plan(network, {}, 0.5)


# Limits


def test_kept_layers_stay_as_they_are():
    network = chain(3, 8, 8, 8, 2)
    for pattern, kept in (("conv1", {"g1", "g2"}), ("conv0", {"g1"}), ("conv[23]", {"g2", "g3"})):
        found = widths(make_plan(network, {}, least_macs(network, config(keep=(pattern,))), config(keep=(pattern,))))
        assert {name for name, width in found.items() if width == 8} == kept
    whole = widths(
        make_plan(residual(), {}, least_macs(residual(), config(keep=("block.conv2",))), config(keep=("block.conv2",)))
    )
    assert whole == {"stream": 1, "a": 2, "b": 3}


def test_a_branch_with_a_kept_layer_or_a_limit_is_not_dropped():
    for changes in ({"keep": ("block.conv1",)}, {"max_ratio": 0.9}, {"layer_max_ratio": {"block.conv2": 0.5}}):
        settings = config(**changes)
        plan = make_plan(residual(), {}, least_macs(residual(), settings), settings)
        assert plan.dropped == () and 0 not in widths(plan).values(), changes


def test_ratio_limits_by_hand():
    network = chain(3, 10, 10, 10, 2)
    settings = config(max_ratio=0.7, layer_max_ratio={"conv0": 0.25, "conv*": 0.9, "conv2": 0.5})
    plan = make_plan(network, {}, least_macs(network, settings), settings)
    assert widths(plan) == {"g1": 8, "g2": 1, "g3": 5}
    network = replace(network, dense_sizes={"g1": 20})
    settings = config(max_ratio=0.7)
    assert widths(make_plan(network, {}, least_macs(network, settings), settings)) == {"g1": 6, "g2": 3, "g3": 3}


def test_patterns_that_match_nothing_are_refused():
    for option, value in {"keep": ("convv1",), "layer_max_ratio": {"convv1": 0.5}}.items():
        settings = config(**{option: value})
        with pytest.raises(ConfigError, match=rf"{option}: no layer .* matches 'convv1'; did you mean 'conv1'"):
            make_plan(chain(3, 8, 2), {}, 10, settings)
    with pytest.raises(PlanError, match=r"no channel group .* can be pruned .* keep fewer layers"):
        make_plan(chain(3, 8, 2), {}, 10, config(keep=("*",)))


# Pairs


def test_cyclic_pairs_by_hand():
    scores = torch.tensor([0.1, 0.9, 0.4, 0.8, 0.3, 0.2])
    # Kept by rank: 1, 3; removed by rank: 2, 4, 5, 0.
    assert cyclic_pairs(scores, (1, 3)) == ((2, 1), (4, 3), (5, 1), (0, 3))
    assert cyclic_pairs(scores, range(6)) == () == cyclic_pairs(scores, ())
    assert cyclic_pairs(torch.ones(4), (2, 3)) == ((0, 2), (1, 3))  # ties by position


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused(bad):
    network = chain(3, 4, 5)
    with pytest.raises(PlanError, match=r"scores of group 'g1' are not all numbers; look for NaN"):
        make_plan(network, {"g1": torch.tensor([1.0, bad, 2.0, 3.0])}, network.macs // 2, config())
