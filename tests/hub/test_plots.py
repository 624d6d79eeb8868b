"""Pictures that show the report's own numbers, legibly, and the same bytes each time."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from support.tiers import first_by_default

from hf_camphive.core.measures import Accuracy, Footprint, Latency
from hf_camphive.hub.plots import (
    MAX_CURVES,
    draw_finetune,
    draw_plots,
    draw_ratios,
    draw_scores,
    draw_summary,
    draw_widths,
)
from hf_camphive.hub.report import GroupRow, PruneReport, Stage

GROUPS = (
    GroupRow("conv1", 16, 12, None),
    GroupRow("layer1.0.conv1", 64, 0, None),
    GroupRow("layer4.0.conv2", 512, 512, "read by an operation that is not known"),
)
EPOCHS = [
    {"epoch": 1.0, "loss": 0.8, "learning_rate": 0.1, "validation_top1": 0.88, "seconds": 9.0},
    {"epoch": 1.5, "loss": 0.5, "learning_rate": 0.1, "validation_top1": 0.91, "seconds": 4.0},
]


def cost(macs, milliseconds):
    return Footprint(macs // 100, macs, macs // 25, {1: Latency(milliseconds, 1.0, 9.0, 50)})


def report(groups=GROUPS, accuracy=True, finetune=EPOCHS):
    stages = [("dense", cost(1_000_000, 4.0), 0.9), ("pruned", cost(250_000, 5.0), 0.8)]
    return PruneReport(
        model_id="digits_resnet",
        revision=None,
        architecture="digits_resnet",
        license=None,
        dataset_id="digits",
        dataset_revision=None,
        splits={},
        rows={},
        input_size=(1, 8, 8),
        stages=tuple(Stage(n, c, Accuracy(a, 1.0, 300, "test") if accuracy else None) for n, c, a in stages),
        config={"criterion": "fisher"},
        command="",
        groups=groups,
        finetune=finetune and {"epochs": finetune, "mixed_precision": "no", "steps": 30},
    )


def texts(figure):
    found = [axes.get_title(loc="left") for axes in figure.axes]
    found += [label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel())]
    found += [text.get_text() for axes in figure.axes for text in axes.texts]
    return found


def bars(axes):
    """Length of the coloured bars by row, in drawing order."""
    rows = {}
    for bar in axes.patches:
        rows.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar.get_width())
    return rows


def overlaps(figure, artists):
    """Whether neighbours of a list of drawn texts overlap vertically."""
    FigureCanvasAgg(figure).draw()
    boxes = sorted((artist.get_window_extent().y0, artist.get_window_extent().y1) for artist in artists)
    return any(lower[1] > upper[0] for lower, upper in pairwise(boxes))


def test_every_picture_is_written_at_readme_width(tmp_path):
    paths = draw_plots(report(), {"conv1": [0.1, 0.2, 0.3]}, tmp_path)
    assert paths == {n: tmp_path / f"{n}.png" for n in ("summary", "widths", "ratios", "scores", "finetune")}
    for path in paths.values():
        with Image.open(path) as image:
            assert image.width == 1200 and 200 < image.height < 1200
            assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_there_is_no_picture_of_what_was_not_done(tmp_path):
    assert set(draw_plots(report(groups=(), finetune=None), None, tmp_path)) == {"summary"}


def test_the_same_report_gives_the_same_bytes(tmp_path):
    (tmp_path / "again").mkdir()
    first = draw_plots(report(), {"conv1": [0.1, 0.2]}, tmp_path)
    second = draw_plots(report(), {"conv1": [0.1, 0.2]}, tmp_path / "again")
    assert all(first[name].read_bytes() == second[name].read_bytes() for name in first)


def test_widths_show_the_shares():
    figure = draw_widths(report())
    (axes,) = figure.axes
    assert bars(axes) == {0: [75.0, 25.0], 1: [0.0, 100], 2: [100.0, 0.0]}
    assert [label.get_text() for label in axes.get_yticklabels()] == [group.name for group in GROUPS]
    assert {"12 / 16", "0 / 64  dropped", "512 / 512  frozen", "524 of 592 channels kept (89 %)"} <= set(texts(figure))
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # forward order reads downwards


def test_ratios_are_sorted_and_bottlenecks_stand_out():
    figure = draw_ratios(report())
    (axes,) = figure.axes
    assert bars(axes) == {0: [25.0], 1: [100.0]}  # the frozen group cannot be a bottleneck
    assert [label.get_text() for label in axes.get_yticklabels()] == ["conv1", "layer1.0.conv1"]
    orange, blue = (bar.get_facecolor() for bar in axes.patches)
    assert orange != blue and "1 bottleneck: lost less than half the share of all (orange)" in texts(figure)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(100 * 68 / 80)


def test_ratios_without_bottlenecks_say_so():
    groups = (GroupRow("conv1", 16, 8, None), GroupRow("layer1.0.conv1", 64, 24, None))
    assert "No bottleneck: every group lost at least half the share of all" in texts(draw_ratios(report(groups)))


@pytest.mark.parametrize("count", first_by_default([41, 3, 120]))
def test_names_of_many_groups_do_not_overlap(count):
    groups = tuple(GroupRow(f"stages.{i}.blocks.0.conv_pw.with.a.long.name", 64, i % 64, None) for i in range(count))
    figure = draw_widths(report(groups=groups))
    (axes,) = figure.axes
    labels = axes.get_yticklabels()
    assert not overlaps(figure, labels) and not overlaps(figure, axes.texts)
    assert all(len(label.get_text()) <= 34 for label in labels) and labels[-1].get_text().endswith("long.name")
    assert not overlaps(figure, [axes.get_legend(), axes._left_title])
    assert all(label.get_fontsize() >= 7 for label in labels)
    assert min(artist.get_window_extent().x0 for artist in labels) >= 0


def test_summary_shows_accuracy_and_relative_cost():
    figure = draw_summary(report())
    above, below = figure.axes
    assert bars(above) == {0: [90.0], 1: [80.0]}
    assert bars(below) == {0: [100, 25.0], 1: [100, 25.0], 2: [100, 125.0], 3: [100, 25.0]}
    expected = {"90.00 % ± 1.73", "250.0 k of 1.000 M", "5.00 ms of 4.00 ms", "125 %", "Cost of the pruned network"}
    assert expected <= set(texts(figure))
    assert below.get_xlim()[1] > 125


def test_summary_without_accuracy_shows_the_cost_alone():
    figure = draw_summary(report(accuracy=False))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Cost of the pruned network"]


def test_scores_are_sorted_and_zeros_are_told():
    figure = draw_scores({"a": [3.0, 0.0, 1.0, -2.0], "b": [5.0, 4.0]}, "fisher")
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1.0, 3.0], [4.0, 5.0]]
    assert list(lines[0].get_xdata()) == [62.5, 87.5]
    assert texts(figure)[0] == "Scores by 'fisher'; 2 not above zero left out"
    assert figure.axes[0].get_yscale() == "log"


def test_scores_of_many_groups_stay_few_curves():
    figure = draw_scores({str(i): [i + 1.0, i + 2.0] for i in range(200)}, "")
    lines = figure.axes[0].lines
    assert len(lines) == MAX_CURVES and lines[0].get_ydata()[0] == 1 and lines[-1].get_ydata()[0] == 200
    assert "60 of 200 groups" in texts(figure)[0]


def test_finetune_shows_every_epoch():
    figure = draw_finetune(EPOCHS)
    loss, top1 = (axes.lines[0] for axes in figure.axes)
    assert list(loss.get_xdata()) == [1.0, 1.5] and list(loss.get_ydata()) == [0.8, 0.5]
    assert list(top1.get_ydata()) == [88.0, 91.0]
    assert {"0.500", "91.00", "epochs", "Validation top-1 (%)"} <= set(texts(figure))
    assert len(draw_finetune([EPOCHS[0] | {"validation_top1": None}]).axes) == 1


@pytest.mark.parametrize("top1", [0.9933, 1.0])
def test_finetune_shows_no_more_than_all_images(top1):
    axes = draw_finetune([epoch | {"validation_top1": top1} for epoch in EPOCHS]).axes[1]
    assert len(axes.get_yticks()) > 2 and max(axes.get_yticks()) <= 100
