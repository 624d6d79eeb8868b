"""The plot of a comparison: accuracy over MACs, one line per recipe (a cell without ratio and seed)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_camphive.core.measures import format_count
from hf_camphive.hub.plots import BLUE, GREEN, GREY, ORANGE, PALE, VERMILION, new_axes
from hf_camphive.runs.results import Cell, Results, Summary

LINES = (BLUE, VERMILION, GREEN, ORANGE, "#CC79A7", "#56B4E9", "#222222")
STYLES = (("-", "o"), ("--", "s"), (":", "^"), ("-.", "D"))


def draw_comparison(results: Results) -> Figure:
    """Draw top-1 over MACs at the end of each run: one line per recipe, with a band of one standard deviation over seeds.

    If any recipe was run at several ratios, recipes with a single ratio are left out, as each would be a single point.
    """
    points_of: dict[Cell, list[Summary]] = {}
    for summary in results.summaries():
        points_of.setdefault(summary.recipe, []).append(summary)
    least = min(2, max(map(len, points_of.values())))
    points_of = {recipe: points for recipe, points in points_of.items() if len(points) >= least}
    named = _distinct_names(list(points_of))
    lines = {named[recipe]: points for recipe, points in points_of.items()}
    figure, axes = new_axes(max(4.4, 1.5 + 0.21 * len(lines)))
    for i, (name, points) in enumerate(lines.items()):
        points.sort(key=lambda point: point.of(lambda row: row.macs).mean)
        macs = np.array([point.of(lambda row: row.macs).mean for point in points])
        tops = [point.of(lambda row: 100 * row.final) for point in points]
        middle, band = np.array([top.mean for top in tops]), np.array([top.deviation or 0.0 for top in tops])
        line, marker = STYLES[i // len(LINES) % len(STYLES)]
        colour = LINES[i % len(LINES)]
        axes.plot(macs, middle, linestyle=line, marker=marker, markersize=4, label=name, color=colour, linewidth=1.6)
        axes.fill_between(macs, middle - band, middle + band, color=colour, alpha=0.15, linewidth=0)
    dense = 100 * float(np.mean([row.dense for row in results.rows]))
    axes.axhline(dense, color=GREY, linewidth=1, linestyle=(0, (4, 3)), label=f"dense, {dense:.2f} %")
    axes.xaxis.set_major_formatter(lambda value, _: format_count(value))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("MACs per image")
    axes.set_ylabel("top-1 (%)")
    axes.set_title(f"Accuracy over MACs: {results.settings.get('architecture', '')}", loc="left", fontsize=11)
    axes.grid(True, color=PALE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False, fontsize=8.5)
    return figure


def _distinct_names(recipes: Sequence[Cell]) -> dict[Cell, str]:
    """Return a name for each recipe: its method, and the settings that are not the same for all recipes."""

    def varies(name: str) -> bool:
        return len({getattr(recipe, name) for recipe in recipes}) > 1

    def named(recipe: Cell) -> str:
        cycles = [f"{recipe.cycles} cycle{'s' * (recipe.cycles > 1)}"] if varies("cycles") else []
        images = [f"{recipe.calibration_size:,} images"] if varies("calibration_size") else []
        return ", ".join([recipe.method, *([recipe.merge] if varies("merge") else []), *cycles, *images])

    return {recipe: named(recipe) for recipe in recipes}
