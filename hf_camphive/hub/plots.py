"""Plots of a report for the model card: accuracy and cost, widths, pruning ratios, scores, finetuning.

Draws from data alone and leaves matplotlib's global state unchanged. Colours are those of Okabe and Ito, which can be told
apart with any colour vision; sizes suit a README of about 800 pixels width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hf_camphive.core.measures import Accuracy, format_bytes, format_count, format_ms
from hf_camphive.hub.report import PruneReport, Stage

BLUE, ORANGE, VERMILION, GREEN = "#0072B2", "#E69F00", "#D55E00", "#009E73"
GREY, PALE, INK = "#8C8C8C", "#E4E4E4", "#222222"
STAGE_COLOURS = {"dense": GREY, "pruned": ORANGE, "polished": GREEN, "finetuned": BLUE}
DROPPED: dict[str, Any] = {"facecolor": "white", "edgecolor": VERMILION, "hatch": "/////", "linewidth": 0}
WIDTH = 8.0  # inches; at 150 dots per inch a README shows it at two thirds, sharp on fine screens
DPI = 150
MAX_CURVES = 60
MAX_NAME_LENGTH = 34
_Cost = tuple[str, float, float, Callable[[float], str]]


def draw_plots(report: PruneReport, scores: Mapping[str, Sequence[float]] | None, folder: Path) -> dict[str, Path]:
    """Draw the plots that the report has data for into an existing folder, and return the files by name.

    "summary" is always drawn, "widths" and "ratios" where groups were cut, "scores" where `scores` by group and channel
    are given, "finetune" where the report has a finetuning log.
    """
    figures: dict[str, Figure] = {"summary": draw_summary(report)}
    if report.groups:
        figures["widths"] = draw_widths(report)
    if report.pruning_ratios():
        figures["ratios"] = draw_ratios(report)
    if scores:
        figures["scores"] = draw_scores(scores, str(report.config.get("criterion", "")))
    if report.finetune and report.finetune["epochs"]:
        figures["finetune"] = draw_finetune(report.finetune["epochs"])
    paths = {}
    for name, figure in figures.items():
        paths[name] = Path(folder, f"{name}.png")
        figure.savefig(paths[name], dpi=DPI, metadata={"Software": None})
    return paths


def draw_widths(report: PruneReport) -> Figure:
    """Draw the share of channels kept, one row per channel group in forward order."""
    groups = report.groups
    pitch = 0.21 if len(groups) <= 40 else 0.17
    text = 8.5 if len(groups) <= 40 else 7.5
    figure, axes = new_axes(1.4 + pitch * len(groups))
    rows = range(len(groups))
    for row, group in enumerate(groups):
        kept = 100 * group.kept / max(1, group.size)
        note, colour = f"{group.kept} / {group.size}", INK
        axes.barh(row, kept, color=GREY if group.frozen else BLUE, height=0.78)
        if group.kept:
            axes.barh(row, 100 - kept, left=kept, color=PALE, height=0.78)
        else:
            axes.barh(row, 100, height=0.78, **DROPPED)
            note, colour = f"0 / {group.size}  dropped", VERMILION
        axes.text(101.5, row, f"{note}  frozen" if group.frozen else note, va="center", fontsize=text, color=colour)
    axes.set_yticks(rows, [_shortened(group.name) for group in groups], fontsize=text)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("channels kept (% of the group; kept / all at the right)")
    axes.tick_params(axis="y", length=0)
    before, after = sum(group.size for group in groups), sum(group.kept for group in groups)
    share = 100 * after / max(1, before)
    axes.set_title(f"{after:,} of {before:,} channels kept ({share:.0f} %)", loc="left", fontsize=11, pad=24)
    patches = [Patch(color=BLUE, label="kept"), Patch(color=PALE, label="removed")]
    if any(group.kept == 0 for group in groups):
        patches.append(Patch(label="dropped whole", **DROPPED))
    if any(group.frozen for group in groups):
        patches.append(Patch(color=GREY, label="frozen"))
    axes.legend(
        handles=patches,
        ncols=len(patches),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
        frameon=False,
        fontsize=9,
        handlelength=1.4,
        columnspacing=1.2,
    )
    return figure


def draw_ratios(report: PruneReport) -> Figure:
    """Draw the share of channels removed, one row per group that could be cut, least pruned first.

    A line marks the share over all these groups; bottlenecks have another colour.
    """
    rows = report.pruning_ratios()
    groups = [group for group in report.groups if group.in_scope and not group.frozen]
    overall = 100 * (1 - sum(group.kept for group in groups) / sum(group.size for group in groups))
    text = 8.5 if len(rows) <= 40 else 7.5
    figure, axes = new_axes(1.4 + (0.21 if len(rows) <= 40 else 0.17) * len(rows))
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # hides the line behind a label
    for i, row in enumerate(rows):
        axes.barh(i, 100 * row.ratio, color=VERMILION if row.bottleneck else BLUE, height=0.78)
        label = f"{100 * row.ratio:.0f} %"
        axes.text(100 * row.ratio + 1, i, label, va="center", fontsize=text, color=INK, bbox=clear)
    axes.axvline(overall, color=INK, linewidth=1)
    axes.set_yticks(range(len(rows)), [_shortened(row.group) for row in rows], fontsize=text)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel(f"channels removed (% of the group); line: all groups, {overall:.0f} %")
    axes.tick_params(axis="y", length=0)
    count = sum(row.bottleneck for row in rows)
    title = (
        f"{count} bottleneck{'s' if count > 1 else ''}: lost less than half the share of all (orange)"
        if count
        else "No bottleneck: every group lost at least half the share of all"
    )
    axes.set_title(title, loc="left", fontsize=11)
    return figure


def draw_summary(report: PruneReport) -> Figure:
    """Draw top-1 of each stage that was measured, and below it the last stage's cost relative to the dense network."""
    measured = {stage.name: stage.accuracy for stage in report.stages if stage.accuracy is not None}
    costs = _costs(report)
    heights = [len(rows) + 1.0 for rows in (measured, costs) if rows]
    figure = Figure(
        figsize=(WIDTH, 0.4 + 0.35 * sum(heights) + 0.3 * len(heights)), layout="constrained", facecolor="white"
    )
    panels = list(figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
    farthest = max([100.0, *(100 * after / before for _, before, after, _ in costs)])
    for axes in panels:
        without_frame(axes)
        axes.set_xlim(0, 1.42 * farthest)
        axes.set_xticks([tick for tick in MaxNLocator(6).tick_values(0, farthest) if tick <= farthest])
        axes.tick_params(axis="y", length=0)
    if measured:
        _draw_accuracy(panels[0], measured)
    if costs:
        _draw_costs(panels[-1], costs, report.stages[-1].name)
    return figure


def _draw_accuracy(axes: Axes, stages: Mapping[str, Accuracy]) -> None:
    for row, (name, accuracy) in enumerate(stages.items()):
        top1, error = accuracy.top1, accuracy.standard_error
        axes.barh(row, 100 * top1, color=STAGE_COLOURS.get(name, GREEN), height=0.72)
        axes.text(101.5, row, f"{100 * top1:.2f} % ± {100 * error:.2f}", va="center", fontsize=9.5, color=INK)
    axes.set_yticks(range(len(stages)), list(stages))
    axes.set_ylim(len(stages) - 0.4, -0.6)
    where = sorted({f"{accuracy.images:,} images of {accuracy.split!r}" for accuracy in stages.values()})
    axes.set_title("Top-1 accuracy", loc="left", fontsize=11)
    axes.set_xlabel(f"% of {' and '.join(where)}; ± one standard error", loc="left")


def _draw_costs(axes: Axes, costs: Sequence[_Cost], stage: str) -> None:
    axes.barh(range(len(costs)), [100] * len(costs), color=PALE, height=0.72)
    for row, (_, before, after, show) in enumerate(costs):
        share = 100 * after / before
        axes.barh(row, share, color=STAGE_COLOURS.get(stage, GREEN), height=0.72)
        axes.text(max(100, share) + 1.5, row, f"{show(after)} of {show(before)}", va="center", fontsize=9.5, color=INK)
        inside = share > 12
        axes.text(
            share + (-1 if inside else 1),
            row,
            f"{share:.0f} %",
            ha="right" if inside else "left",
            va="center",
            fontsize=9.5,
            color="white" if inside and stage == "finetuned" else INK,
        )
    axes.set_yticks(range(len(costs)), [label for label, *_ in costs])
    axes.set_ylim(len(costs) - 0.4, -0.6)
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_title(f"Cost of the {stage} network", loc="left", fontsize=11)
    axes.set_xlabel("% of the dense network: less is better", loc="left")


def draw_scores(scores: Mapping[str, Sequence[float]], criterion: str) -> Figure:
    """Draw each group's scores in ascending order on a logarithmic axis; colours give the group's depth."""
    names = list(scores)
    chosen = sorted({round(i) for i in np.linspace(0, len(names) - 1, min(MAX_CURVES, len(names)))})
    figure, axes = new_axes(4.4)
    # The palest end of the map would be invisible on white.
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(names)))
    hidden = 0
    for i in chosen:
        values = np.sort(np.asarray(scores[names[i]], dtype=float))
        shown = np.isfinite(values) & (values > 0)
        hidden += int((~shown).sum())
        rank = 100 * (np.arange(len(values)) + 0.5) / max(1, len(values))
        marker = "o" if shown.sum() < 2 else None  # a single point has no line
        axes.plot(rank[shown], values[shown], color=colours[i], linewidth=1.2, alpha=0.85, marker=marker, markersize=3)
    axes.set_yscale("log")
    axes.set_xlim(0, 100)
    axes.set_xlabel("channels of the group, least important first (%)")
    axes.set_ylabel("score")
    by = f" by {criterion!r}" if criterion else ""
    many = f": {len(chosen)} of {len(names)} groups" if len(chosen) < len(names) else ""
    zero = f"; {hidden:,} not above zero left out" if hidden else ""
    axes.set_title(f"Scores{by}{many}{zero}", loc="left", fontsize=11)
    axes.grid(True, which="major", color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    if len(names) > 1:
        bar = figure.colorbar(ScalarMappable(Normalize(1, len(names)), ListedColormap(colours)), ax=axes, pad=0.02)
        bar.set_label("group, in forward order")
        bar.outline.set_visible(False)
        bar.ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    return figure


def draw_finetune(epochs: Sequence[Mapping[str, float]]) -> Figure:
    """Draw the training loss and, where measured, validation top-1 after each epoch."""
    x = [epoch["epoch"] for epoch in epochs]
    panels = [("Training loss", [epoch["loss"] for epoch in epochs], VERMILION, ".3f")]
    if all(epoch["validation_top1"] is not None for epoch in epochs):
        top1 = [100 * epoch["validation_top1"] for epoch in epochs]
        panels.append(("Validation top-1 (%)", top1, BLUE, ".2f"))
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained", facecolor="white")
    for axes, (title, values, colour, form) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        without_frame(axes)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("epochs")
        axes.grid(True, color=PALE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.08, y=0.15)
        axes.set_xlim(0, max(x) * 1.1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=max(x) >= 2))
        axes.plot(x, values, color=colour, marker="o", markersize=5 if len(x) <= 30 else 2.5, linewidth=1.8)
        if title.endswith("(%)"):
            axes.set_yticks([tick for tick in axes.get_yticks() if tick <= 100])
        axes.annotate(
            f"{values[-1]:{form}}", (x[-1], values[-1]), (0, 8), textcoords="offset points", ha="center", fontsize=9.5
        )
    return figure


def _costs(report: PruneReport) -> list[_Cost]:
    """Return label, dense value, last value and number format of each cost that both stages have."""

    def latency(batch: int) -> Callable[[Stage], float | None]:
        return lambda stage: getattr(stage.footprint.latency_ms.get(batch), "median", None)

    quantities = [
        ("MACs per image", lambda stage: stage.footprint.macs, format_count),
        ("parameters", lambda stage: stage.footprint.parameters, format_count),
        *((f"latency, batch {batch}", latency(batch), format_ms) for batch in report.batch_sizes()),
        ("file size", lambda stage: stage.footprint.file_bytes, format_bytes),
    ]
    first, last = report.stages[0], report.stages[-1]
    rows = [(label, value(first), value(last), show) for label, value, show in quantities]
    return [row for row in rows if row[1] and row[2] is not None]


def new_axes(height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of the usual width and of `height` inches, and its axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    axes = figure.subplots()
    without_frame(axes)
    return figure, axes


def without_frame(axes: Axes) -> None:
    """Remove the frame's top and right lines and draw the others in grey."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9.5)
    axes.xaxis.label.set_fontsize(9.5)
    axes.yaxis.label.set_fontsize(9.5)


def _shortened(name: str) -> str:
    half = MAX_NAME_LENGTH // 2
    return name if len(name) <= MAX_NAME_LENGTH else f"{name[: half - 1]}…{name[-half:]}"
