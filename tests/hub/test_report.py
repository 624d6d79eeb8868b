"""A table and JSON that stay as they are, and which groups are called bottlenecks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hf_camphive.core.errors import ModelError
from hf_camphive.core.measures import NOT_MEASURED, Accuracy, Footprint, Latency, format_bytes, format_count, format_ms
from hf_camphive.core.runtime import environment
from hf_camphive.hub.report import GroupRow, PruneReport, Stage

DENSE = Footprint(
    853_018, 125_485_706, 3_460_000, {1: Latency(4.21, 4.1, 4.9, 100), 32: Latency(71.2, 70.1, 75.0, 45)}
)
SMALL = Footprint(400_123, 59_754_000, 1_650_000, {1: Latency(3.0, 2.9, 3.3, 100), 32: Latency(32.6, 32.0, 34.0, 45)})


def report(**changes):
    values = {
        "model_id": "cifar_resnet56",
        "revision": "0123abc",
        "architecture": "cifar_resnet56",
        "license": None,
        "dataset_id": "uoft-cs/cifar10",
        "dataset_revision": None,
        "splits": {"train": "train", "validation": "10% of train", "test": "test"},
        "rows": {"train": 45_000, "validation": 5_000, "test": 10_000},
        "input_size": (3, 32, 32),
        "stages": (
            Stage("dense", DENSE, Accuracy(0.9339, 0.998, 10_000, "test")),
            Stage("pruned", SMALL, Accuracy(0.906, 0.996, 10_000, "test")),
            Stage("finetuned", SMALL, Accuracy(0.9195, 0.997, 10_000, "test")),
        ),
        "config": {"target_macs": 0.5, "seed": 0},
        "command": "camphive --model cifar_resnet56",
        "groups": (GroupRow("conv1", 16, 16, None), GroupRow("fc", 10, 10, "output of the network")),
        "dropped": ("layer1.0",),
        "notes": ("a note",),
        "finetune": {"epochs": [{"epoch": 1.0, "loss": 0.5}], "mixed_precision": "no", "steps": 352},
        "seconds": {"finetune": 12.5},
        "environment": {"device": "a CPU", "threads": "2"},
    }
    return PruneReport(**values | changes)


TABLE = """\
cifar_resnet56 on uoft-cs/cifar10, images of 3x32x32

                     dense   pruned  finetuned         change
-------------------------------------------------------------
top-1              93.39 %  90.60 %    91.95 %   -1.44 points
top-5              99.80 %  99.60 %    99.70 %   -0.10 points
MACs per image     125.5 M  59.75 M    59.75 M    2.10x fewer
parameters         853.0 k  400.1 k    400.1 k    2.13x fewer
latency, batch 1   4.21 ms  3.00 ms    3.00 ms   1.40x faster
latency, batch 32  71.2 ms  32.6 ms    32.6 ms   2.18x faster
file size          3.46 MB  1.65 MB    1.65 MB  2.10x smaller
-------------------------------------------------------------
Accuracy on 10,000 images of 'test'; standard error of top-1: 0.27 points.
Latency: median of 45 to 100 interleaved runs on a CPU, 2 threads.
1 MAC = 2 FLOPs; 1 MB = 10^6 bytes."""


def test_table_is_as_published():
    assert report().table() == TABLE
    alone = replace(report(), environment={"device": "a CPU", "threads": "1"})
    assert alone.table() == TABLE.replace("2 threads", "1 thread")


def test_table_says_what_was_not_measured_and_what_grew():
    bare = Footprint(2_000, 10**6, 9_000, {})
    stages = (Stage("dense", Footprint(1_000, 10**6, 9_000, {}), None), Stage("pruned", bare, None))
    lines = report(stages=stages, model_id="m" * 80, dataset_id="d " * 40).table().splitlines()
    rows = {line[:16].strip(): line for line in lines}
    assert rows["top-1"].count(NOT_MEASURED) == rows["latency"].count(NOT_MEASURED) == 2
    assert rows["parameters"].endswith("2.00x more")
    assert rows["MACs per image"].endswith("unchanged")
    assert max(map(len, lines)) <= 100


def test_table_of_one_stage_has_no_change_column():
    assert "change" not in report(stages=report().stages[:1]).table()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (format_count(1_814_073_344), "1.814 G"),
        (format_count(11_689_512), "11.69 M"),
        (format_count(640), "640"),
        (format_count(999_960), "1.000 M"),
        (format_bytes(46_807_480), "46.8 MB"),
        (format_bytes(712), "712 B"),
        (format_ms(0.0512), "0.05 ms"),
        (format_ms(1234.5), "1234 ms"),
    ],
)
def test_numbers_for_people(text, shown):
    assert text == shown


def test_json_round_trip():
    first = report()
    assert PruneReport.from_json(first.to_json()) == first
    bare = report(stages=(Stage("dense", DENSE, None),), finetune=None)
    assert PruneReport.from_json(bare.to_json()) == bare


@pytest.mark.parametrize("damage", ["", "[1]", '{"schema": 1}', '{"schema": 99}', None])
def test_foreign_json_is_refused(damage):
    text = damage if damage is not None else json.dumps(report().to_dict() | {"colour": "red"})
    with pytest.raises(ModelError, match="wrote it"):
        PruneReport.from_json(text)


def test_environment_names_what_figures_depend_on():
    found = environment(processes=2)
    assert found["torch"] == torch.__version__.partition("+")[0] or found["torch"] == torch.__version__
    assert found["processes"] == "2" and found["device"] and all(isinstance(v, str) for v in found.values())


def test_bottlenecks_lost_less_than_half_the_share_of_all():
    rows = (("a", 10, 10), ("b", 10, 8), ("c", 20, 8), ("d", 10, 0), ("e", 10, 9))
    groups = [GroupRow(name, size, kept, None) for name, size, kept in rows]
    out = [GroupRow("stem", 90, 90, None, in_scope=False), GroupRow("fc", 10, 10, "output of the network")]
    found = report(groups=(*groups, *out))
    ratios = [(row.group, round(row.ratio, 9), row.bottleneck) for row in found.pruning_ratios()]
    # 25 of 60 channels went; half that share is 0.208.
    assert ratios == [("a", 0, True), ("e", 0.1, True), ("b", 0.2, True), ("c", 0.6, False), ("d", 1, False)]
    table = json.loads(found.to_json())["pruning_ratios"]
    assert [row["group"] for row in table] == ["a", "e", "b", "c", "d"] and table[0]["bottleneck"]
    assert PruneReport.from_json(found.to_json()) == found


def test_nothing_pruned_has_no_bottlenecks():
    assert not any(row.bottleneck for row in report().pruning_ratios())


@pytest.mark.parametrize(("top1", "expected"), [(0.8, 0.04), (1.0, 4.975e-5**0.5), (0.0, 4.975e-5**0.5)])
def test_the_standard_error_is_never_none(top1, expected):
    """sqrt(0.8 * 0.2 / 100), and sqrt(0.005 * 0.995 / 100) for half an image of a hundred."""
    assert Accuracy(top1, 1.0, 100, "test").standard_error == pytest.approx(expected, rel=1e-9)


def test_a_report_from_before_its_numbers_were_recorded_loads():
    text = Path(__file__).parent.parent.joinpath("golden/saved_folder/report.json").read_text(encoding="utf-8")
    assert "tuning" not in json.loads(text)
    assert PruneReport.from_json(text).tuning == {}


def test_the_numbers_of_the_method_survive_json():
    found = report(tuning={"MIX": 0.5, "BETAS": [0.9, 0.99]})
    assert PruneReport.from_json(found.to_json()) == found != report()
