"""A plan equals its JSON, refuses what contradicts itself, and says in words what it does."""

import json
import random
from dataclasses import replace

import pytest

from hf_camphive.core.errors import CampHiVeError, PlanError
from hf_camphive.core.plan import (
    Branch,
    ChannelCut,
    ChannelGroup,
    PrunePlan,
    Slot,
    decode_runs,
    encode_runs,
    plans_from_json,
    plans_to_json,
)

GROUPS = (
    ChannelGroup(
        "conv1",
        4,
        (Slot("conv1.weight", 0, "producer", (0, 1, 2, 3)), Slot("fc.weight", 1, "consumer", tuple(range(8)))),
    ),
    ChannelGroup("block.conv", 3, (Slot("block.conv.weight", 0, "producer", (0, 1, 2)),)),
    ChannelGroup("fc", 10, (Slot("fc.weight", 0, "producer", tuple(range(10))),), "output of the network"),
)
BRANCH = Branch("block", ("down",), ("act",), ("block.conv",), ("block.conv",), ("block.conv.weight",), "add", "bn")
PLAN = PrunePlan(
    groups=GROUPS,
    branches=(BRANCH,),
    cuts=(ChannelCut("conv1", (0, 2, 3), ((1, 3),)), ChannelCut("block.conv", ())),
    dropped=("block",),
    criterion="fisher",
    merge="cyclic",
    macs_before=1_000_000,
    macs_after=400_000,
)
GOLDEN = """\
{
 "schema": 1,
 "cycles": [
  {"criterion": "fisher", "merge": "cyclic", "macs_before": 1000000, "macs_after": 400000, "dropped": ["block"],
   "cuts": [{"group": "conv1", "keep": "0 2:4", "pairs": [[1, 3]]}, {"group": "block.conv", "keep": "", "pairs": []}],
   "groups": [
    {"name": "conv1", "size": 4, "frozen": null,
     "slots": [["conv1.weight", 0, "producer", "0:4"], ["fc.weight", 1, "consumer", "0:8"]]},
    {"name": "block.conv", "size": 3, "frozen": null, "slots": [["block.conv.weight", 0, "producer", "0:3"]]},
    {"name": "fc", "size": 10, "frozen": "output of the network", "slots": [["fc.weight", 0, "producer", "0:10"]]}
   ],
   "branches": [
    {"module": "block", "shortcut": ["down"], "after": ["act"], "groups": ["block.conv"], "gates": ["block.conv"],
     "tensors": ["block.conv.weight"], "add": "add", "output": "bn"}
   ]}
 ]
}
"""


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((), ""),
        ((5,), "5"),
        ((0, 1), "0:2"),
        ((0, 2), "0 2"),
        ((0, 1, 2, 8, 10, 12), "0:3 8:13:2"),
        ((1, 3, 5, 6), "1:6:2 6"),
        ((3, 2, 1), "3 2 1"),
        ((4, 4, 4), "4 4 4"),
        ((0, 4, 8, 1, 5, 9), "0:9:4 1:10:4"),
    ],
    ids=repr,
)
def test_runs_by_hand(numbers, text):
    assert encode_runs(numbers) == text
    assert decode_runs(text) == numbers


def test_runs_of_random_lists():
    chance = random.Random(0)
    for _ in range(2000):
        top = chance.choice([3, 10, 500])
        numbers = [chance.randrange(top) for _ in range(chance.randrange(30))]
        for given in (numbers, sorted(set(numbers)), sorted(numbers), list(range(0, top, chance.randint(1, 7)))):
            assert decode_runs(encode_runs(given)) == tuple(given)


def test_runs_are_short():
    assert len(encode_runs(range(0, 100_000, 3))) < 15


def test_json_is_what_it_was():
    assert json.loads(plans_to_json([PLAN])) == json.loads(GOLDEN)
    assert plans_from_json(GOLDEN) == (PLAN,)


def test_plans_survive_being_written_down():
    second = replace(PLAN, cuts=(), dropped=(), criterion="random")
    assert plans_from_json(plans_to_json([PLAN, second])) == (PLAN, second)
    assert plans_from_json(plans_to_json([])) == ()
    assert PrunePlan.from_dict(PLAN.to_dict()) == PLAN and hash(PrunePlan.from_dict(PLAN.to_dict())) == hash(PLAN)
    assert second != PLAN


def test_kept_channels_of_every_group():
    assert PLAN.keep == {"conv1": (0, 2, 3), "block.conv": (), "fc": tuple(range(10))}


def test_positions_of_channels():
    assert GROUPS[0].slots[1].positions((2, 0), 4) == [0, 1, 4, 5]  # two columns a channel
    assert Slot("w", 1, "consumer", (0, 4, 1, 5)).positions((1,), 2) == [1, 5]
    assert [slot.tensor for slot in GROUPS[0].consumers()] == ["fc.weight"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cuts": (ChannelCut("conv2", (0,)),)}, "cuts group 'conv2', which is not among its groups"),
        ({"cuts": (ChannelCut("fc", (0,)),)}, "cuts group 'fc', which is frozen: output of the network"),
        ({"cuts": (ChannelCut("conv1", (0, 4)),)}, r"keep must be ascending channels of 0\.\.3, got \(0, 4\)"),
        ({"cuts": (ChannelCut("conv1", (-1, 2)),)}, "keep must be ascending"),
        ({"cuts": (ChannelCut("conv1", (2, 1)),)}, "keep must be ascending"),
        ({"cuts": (ChannelCut("conv1", (1, 1)),)}, "keep must be ascending"),
        (
            {"cuts": (ChannelCut("conv1", (0, 1), ((1, 0),)),)},
            r"pair \(1, 0\) must go from a removed to a kept channel",
        ),
        ({"cuts": (ChannelCut("conv1", (0, 1), ((2, 3),)),)}, r"pair \(2, 3\) must go from a removed to a kept"),
        ({"dropped": ("nowhere",)}, r"drops \['nowhere'\], which are not among its branches"),
    ],
    ids=repr,
)
def test_plans_that_contradict_themselves(changes, message):
    with pytest.raises(PlanError, match=message):
        replace(PLAN, **changes)
    values = replace(PLAN, cuts=(), dropped=()).to_dict()
    if "cuts" in changes:
        (cut,) = changes["cuts"]
        values["cuts"] = [{"group": cut.group, "keep": " ".join(map(str, cut.keep)), "pairs": cut.pairs}]
    else:
        values["dropped"] = changes["dropped"]
    with pytest.raises(PlanError, match=message):
        plans_from_json(json.dumps({"schema": 1, "cycles": [values]}))


@pytest.mark.parametrize("key", PLAN.to_dict())
def test_plans_with_something_missing(key):
    values = PLAN.to_dict()
    del values[key]
    with pytest.raises(PlanError, match=f"prune_plan.json is damaged .*'{key}'.*restore it from the run"):
        PrunePlan.from_dict(values)


@pytest.mark.parametrize(
    "change",
    [
        {"cuts": [{"group": "conv1", "keep": 5, "pairs": []}]},
        {"cuts": [{"group": "conv1", "keep": "a:b", "pairs": []}]},
        {"cuts": [{"group": "conv1", "keep": "0:3:0", "pairs": []}]},
        {"cuts": [{"group": "conv1", "keep": "0:2", "pairs": [[1]]}]},
        {"cuts": ["conv1"]},
        {"cuts": None},
        {"groups": [{"name": "conv1"}]},
        {"groups": [{"name": "conv1", "size": 4, "frozen": None, "slots": [["w", 0]]}]},
        {"branches": [{"module": "block"}]},
        {"branches": [{**PLAN.to_dict()["branches"][0], "extra": 1}]},
        {"branches": ["block"]},
    ],
    ids=repr,
)
def test_plans_with_something_wrong(change):
    with pytest.raises(PlanError, match=r"prune_plan\.json is damaged"):
        PrunePlan.from_dict(PLAN.to_dict() | change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "prune_plan.json is not valid JSON.*restore it"),
        ('{"schema": 1, "cycles": [', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ('{"schema": 2, "cycles": []}', "has schema 2, not 1; install the version of hf_camphive that wrote it"),
        ('{"cycles": []}', "has no schema, so that hf_camphive did not write it"),
        ("[]", "holds a value of type list, not a table"),
        ('{"schema": 1}', "is damaged .it lacks 'cycles'."),
        ('{"schema": 1, "cycles": 5}', "is damaged"),
        ('{"schema": 1, "cycles": [5]}', "is damaged"),
        ('{"schema": 1, "cycles": [null]}', "is damaged"),
    ],
    ids=repr,
)
def test_files_that_hold_no_plan(text, message):
    with pytest.raises(PlanError, match=message) as caught:
        plans_from_json(text)
    assert isinstance(caught.value, CampHiVeError)


def test_summary():
    assert PLAN.summary().splitlines() == [
        "group       channels  kept  removed",
        "-----------------------------------",
        "conv1              4     3      25%",
        "block.conv         3     0     100%",
        "dropped whole: block",
        "frozen: fc (10 channels): output of the network",
        "MACs per image: 1,000,000 -> 400,000 (40.0%, 2.50x fewer)",
    ]


def test_diff():
    assert PLAN.diff(PLAN) == PLAN.diff(replace(PLAN, criterion="random")) == ""
    other = replace(PLAN, cuts=(ChannelCut("conv1", (0, 1)), ChannelCut("block.conv", (0, 1))))
    assert PLAN.diff(other).splitlines() == [
        "block.conv: keeps - where the other keeps 0:2",
        "conv1: keeps 2:4 where the other keeps 1",
    ]
