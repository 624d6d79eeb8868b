"""A comparison's figures against hand-worked ones, in every format that they are given in."""

import csv
import io
import json
from dataclasses import replace
from statistics import stdev

import numpy as np
import pytest

from hf_camphive.core.errors import OutputError
from hf_camphive.runs.comparison_plot import draw_comparison
from hf_camphive.runs.results import Cell, Results, Row, Spread, differences


def row(method="fisher", ratio=2.0, seed=0, *, pruned=0.5, recalibrated=0.6, recalibrates=True, **changes):
    values = {
        "dense": 0.9,
        "finetuned": None,
        "images": 400,
        "split": "test",
        "calibration": "64 of 100 rows of train",
        "dense_macs": 1000,
        "macs": round(1000 / ratio),
        "parameters": 70,
        "dropped": 0,
        "seconds": {"score": 2.0, "plan": 0.5, "merge": 4.0},
    }
    cell = Cell(method, changes.pop("merge", "none"), ratio, changes.pop("cycles", 1), 64, seed)
    return Row(cell, pruned=pruned, recalibrated=recalibrated, recalibrates=recalibrates, **values | changes)


ROWS = (
    row(seed=0, recalibrated=0.60),
    row(seed=1, recalibrated=0.70),
    row(ratio=4.0, recalibrated=0.4),
    row("hive", recalibrates=False, pruned=0.8),
    row("hive", ratio=4.0, finetuned=0.3, notes=("Not polished.",)),
)
RESULTS = Results({"architecture": "toy", "learning_rate": 0.005}, ROWS, {"taylor none 4x": "no such budget"})


def test_mean_and_spread():
    assert Spread.of([0.6, 0.7]) == Spread(pytest.approx(0.65), pytest.approx(0.1 / 2**0.5))
    assert Spread.of([0.6, 0.7]).percent() == "65.00 ± 7.07"
    assert Spread.of([0.6]).percent() == "60.00"


@pytest.mark.parametrize(
    ("changes", "delivered", "final"),
    [
        ({"recalibrates": True}, 0.6, 0.6),
        ({"recalibrates": False}, 0.5, 0.5),
        ({"recalibrates": False, "polished": 0.3}, 0.5, 0.3),
        ({"recalibrates": False, "polished": 0.3, "finetuned": 0.2}, 0.5, 0.2),
    ],
)
def test_what_a_run_ends_with(changes, delivered, final):
    assert (row(**changes).delivered, row(**changes).final) == (delivered, final)


def test_json_gives_everything_back():
    again = Results.from_json(RESULTS.to_json(), "here")
    assert again == RESULTS and again.summaries() == RESULTS.summaries()


def test_settings_kept_as_texts_are_those_of_today():
    values = json.loads(RESULTS.to_json())
    values["settings"] |= {"keep": "", "layer_max_ratio": "conv1=0.5"}
    found = Results.from_json(json.dumps(values), "here").settings
    assert not differences(found, RESULTS.settings | {"keep": [], "layer_max_ratio": {"conv1": 0.5}})


def test_rows_kept_before_notes_were_are_read():
    values = json.loads(RESULTS.to_json())
    for kept in values["rows"]:
        del kept["notes"]
    rows = Results.from_json(json.dumps(values), "here").rows
    assert rows == tuple(replace(row, notes=()) for row in RESULTS.rows)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not valid JSON"),
        ("[]", "type list"),
        ("{}", "no schema"),
        ('{"schema": 2, "rows": [], "settings": {}}', "schema 2, not 1"),
        ('{"schema": 1, "rows": [{"cell": 1}]}', "damaged .* restore it, or choose another --output-dir"),
    ],
)
def test_damaged_json_is_refused_by_name(text, fault):
    with pytest.raises(OutputError, match=f"there/results.json .*{fault}"):
        Results.from_json(text, "there/results.json")


def test_a_row_takes_the_place_of_the_same_run_and_of_its_failure():
    better = row(ratio=4.0, recalibrated=0.5)
    failed = RESULTS.with_failure(better.cell, "why")
    assert failed.failed[str(better.cell)] == "why" and failed.rows == RESULTS.rows
    mended = failed.with_row(better)
    assert len(mended.rows) == len(ROWS) and better in mended.rows and mended.failed == RESULTS.failed


def test_csv_has_a_line_for_each_run():
    lines = list(csv.DictReader(io.StringIO(RESULTS.to_csv())))
    assert len(lines) == len(ROWS)
    first = lines[0]
    assert (first["method"], first["ratio"], first["seed"], first["recalibrated"]) == ("fisher", "2.0", "0", "0.6")
    assert (first["seconds_merge"], first["seconds_finetune"], first["finetuned"]) == ("4.0", "", "")


def test_the_markdown_says_who_is_best_and_what_it_cost():
    text = RESULTS.to_markdown()
    assert "| `hive` | `none` | 1 | 64 | **80.00** | 30.00 |" in text
    assert "| `fisher` | `none` | 1 | 64 | 65.00 ± 7.07 | **40.00** |" in text
    assert text.index("`fisher`") < text.index("`hive`")  # ahead at the largest ratio
    stages = "50.00 ± 0.00 | **65.00 ± 7.07** |  |  | 70 | 2.0 + 0.5 + 4.0 |"
    assert f"| `fisher` | `none` | 1 | 64 | 2.00x | 2 | {stages}" in text
    assert "| `hive` | `none` | 1 | 64 | 2.00x | 1 | **80.00** | 60.00 |" in text
    assert "on 400 images of 'test'; dense 90.00" in text and "at least 1.5 points" in text
    assert "Failed: taylor none 4x: no such budget" in text
    assert "No row is done" in Results({}).to_markdown()


def test_settings_that_part_are_named():
    assert differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: 2 then, 3 now", "c: None then, 4 now"]


def lines_of(figure):
    return {line.get_label(): line for line in figure.axes[0].get_lines()}


def test_the_plot_shows_means_and_spread_over_macs():
    figure = draw_comparison(RESULTS)
    lines = lines_of(figure)
    assert lines.keys() == {"fisher", "hive", "dense, 90.00 %"}
    assert lines["fisher"].get_xdata().tolist() == [250, 500]
    assert np.allclose(lines["fisher"].get_ydata(), [40, 65])
    assert np.allclose(lines["hive"].get_ydata(), [30, 80])
    spread = 100 * stdev([0.6, 0.7])
    corners = figure.axes[0].collections[0].get_paths()[0].vertices
    at = corners[corners[:, 0] == 500][:, 1]
    assert np.isclose(at.min(), 65 - spread) and np.isclose(at.max(), 65 + spread)


def test_the_plot_names_whatever_is_not_the_same():
    other = row(merge="lstsq", cycles=2)
    rows = (*(row for row in ROWS if row.cell.ratio == 2), other)
    assert lines_of(draw_comparison(replace(RESULTS, rows=rows))).keys() == {
        "fisher, none, 1 cycle",
        "hive, none, 1 cycle",
        "fisher, lstsq, 2 cycles",
        "dense, 90.00 %",
    }
    assert lines_of(draw_comparison(replace(RESULTS, rows=(*ROWS, other)))).keys() == {
        "fisher",
        "hive",
        "dense, 90.00 %",
    }
