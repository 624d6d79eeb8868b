"""Results of a comparison as data: one row per run, mean and spread over seeds, as JSON, CSV and Markdown.

Pure: needs no network and writes no file. Accuracies are top-1 shares in [0, 1], seconds are wall time, MACs per image.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import mean, stdev
from typing import Any

from hf_camphive.core.config import without_texts
from hf_camphive.core.errors import OutputError
from hf_camphive.core.records import RecordFormat

FORMAT = RecordFormat("results.json", OutputError, remedy="restore it, or choose another --output-dir")
STEPS = ("score", "plan", "merge", "recalibrate", "polish", "finetune")  # steps whose seconds the tables show


@dataclass(frozen=True, order=True)
class Cell:
    """One run of a grid: `ratio` times fewer MACs in `cycles` cycles, with calibration images drawn by `seed`."""

    method: str
    merge: str
    ratio: float
    cycles: int = 1
    calibration_size: int = 1024
    seed: int = 0

    def __str__(self) -> str:
        return (
            f"{self.method} {self.merge} {self.ratio:g}x cycles={self.cycles} calibration={self.calibration_size} "
            f"seed={self.seed}"
        )


@dataclass(frozen=True)
class Row:
    """Measurements of one run.

    `pruned` is the accuracy directly after the cut, `recalibrated` the one with the BatchNorm statistics of the
    calibration images. The merge rule delivers the latter if `recalibrates` is set, else the former; the network it
    delivers is polished and finetuned if the settings ask for it. `notes` are the pruner's.
    """

    cell: Cell
    dense: float
    pruned: float
    recalibrated: float
    finetuned: float | None
    recalibrates: bool
    images: int
    split: str
    calibration: str
    dense_macs: int
    macs: int
    parameters: int
    dropped: int
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    polished: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def delivered(self) -> float:
        """Accuracy of the network that the merge rule delivers."""
        return self.recalibrated if self.recalibrates else self.pruned

    @property
    def final(self) -> float:
        """Accuracy at the end of the run."""
        later = [stage for stage in (self.finetuned, self.polished) if stage is not None]
        return later[0] if later else self.delivered


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (None for a single value)."""

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Return the spread of these values."""
        values = list(values)
        return cls(mean(values), stdev(values) if len(values) > 1 else None)

    def percent(self) -> str:
        """Format in percent: 0.9083 and 0.0025 become "90.83 ± 0.25"."""
        return f"{100 * self.mean:.2f}" + ("" if self.deviation is None else f" ± {100 * self.deviation:.2f}")


@dataclass(frozen=True)
class Summary:
    """The rows of one cell over all seeds; `cell` is the one of the lowest seed."""

    cell: Cell
    rows: tuple[Row, ...]

    def of(self, value: Callable[[Row], float]) -> Spread:
        """Return the spread of a quantity over the rows."""
        return Spread.of(map(value, self.rows))

    @property
    def recipe(self) -> Cell:
        """The cell without ratio and seed, which identifies one line of a plot."""
        return replace(self.cell, ratio=0.0, seed=0)


@dataclass(frozen=True)
class Results:
    """All rows so far, the failed cells with their reasons, and the settings that all rows share."""

    settings: dict[str, Any]
    rows: tuple[Row, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)

    def done(self) -> frozenset[Cell]:
        """Return the cells that have a row."""
        return frozenset(row.cell for row in self.rows)

    def with_row(self, row: Row) -> "Results":
        """Return the results with a row added, in place of an older row or failure of the same cell."""
        kept = [other for other in self.rows if other.cell != row.cell]
        failed = {key: reason for key, reason in self.failed.items() if key != str(row.cell)}
        return replace(self, rows=tuple(sorted([*kept, row], key=lambda row: row.cell)), failed=failed)

    def with_failure(self, cell: Cell, reason: str) -> "Results":
        """Return the results with the reason why a cell failed."""
        return replace(self, failed=dict(sorted({**self.failed, str(cell): reason}.items())))

    def summaries(self) -> list[Summary]:
        """Return one summary per cell without its seed, in the order of cells."""
        together: dict[Cell, list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.cell):
            together.setdefault(replace(row.cell, seed=0), []).append(row)
        return [Summary(rows[0].cell, tuple(rows)) for rows in together.values()]

    # Formats

    def to_json(self) -> str:
        """Return the text of `results.json`."""
        return FORMAT.write(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, where: str) -> "Results":
        """Read the text of `results.json`; `where` names the file in messages.

        Raises:
            OutputError: The text is damaged, or is not a comparison's results.
        """
        return FORMAT.read(text, cls._from_values, where)

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "Results":
        rows = tuple(_row(**row) for row in values["rows"])
        return cls(**values | {"settings": without_texts(values["settings"]), "rows": rows})

    def to_csv(self) -> str:
        """Return one line per row, with shares in [0, 1] and a column for the seconds of each step."""
        plain = [f.name for f in fields(Row) if f.name not in ("cell", "seconds", "environment", "notes")]
        columns = [f.name for f in fields(Cell)] + plain + [f"seconds_{step}" for step in STEPS]
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            values = asdict(row.cell) | {name: getattr(row, name) for name in plain}
            writer.writerow(values | {f"seconds_{step}": row.seconds.get(step) for step in STEPS})
        return text.getvalue()

    def to_markdown(self) -> str:
        """Return two tables: final accuracy by method and ratio, then every stage of each cell with its cost."""
        if not self.rows:
            return "No row is done yet.\n"
        parts = [_measured(self), by_ratio(self.summaries()), "", *_failures(self), _all_stages(self.summaries())]
        return "\n".join(parts) + "\n"


def _row(cell: dict[str, Any], notes: Iterable[str] = (), **values: Any) -> Row:
    return Row(Cell(**cell), notes=tuple(notes), **values)


def by_ratio(summaries: Iterable[Summary]) -> str:
    """Return a Markdown table of final top-1 in %: one row per recipe, one column per ratio, its best value in bold."""
    summaries = list(summaries)
    ratios = sorted({summary.cell.ratio for summary in summaries})
    found = {(summary.recipe, summary.cell.ratio): summary.of(lambda row: row.final) for summary in summaries}
    best = {ratio: max(spread.mean for (_, r), spread in found.items() if r == ratio) for ratio in ratios}
    recipes = list(dict.fromkeys(summary.recipe for summary in summaries))
    recipes.sort(key=lambda recipe: [-found[recipe, r].mean if (recipe, r) in found else 1.0 for r in ratios[::-1]])

    def shown(recipe: Cell, ratio: float) -> str:
        if (recipe, ratio) not in found:
            return ""
        text = found[recipe, ratio].percent()
        return f"**{text}**" if found[recipe, ratio].mean == best[ratio] else text

    lines = [[*_names(recipe), *(shown(recipe, ratio) for ratio in ratios)] for recipe in recipes]
    return _table(["method", "merge", "cycles", "calibration", *(f"{ratio:g}x" for ratio in ratios)], lines)


def _all_stages(summaries: Iterable[Summary]) -> str:
    lines = []
    for summary in summaries:
        stages = [summary.of(lambda row: row.pruned).percent(), summary.of(lambda row: row.recalibrated).percent()]
        delivered = 1 if summary.rows[0].recalibrates else 0
        stages[delivered] = f"**{stages[delivered]}**"
        polished = [row.polished for row in summary.rows if row.polished is not None]
        finetuned = [row.finetuned for row in summary.rows if row.finetuned is not None]
        seconds = [Spread.of(row.seconds.get(step, 0.0) for row in summary.rows).mean for step in STEPS[:3]]
        lines.append(
            [
                *_names(summary.cell),
                f"{summary.of(lambda row: row.dense_macs / row.macs).mean:.2f}x",
                str(len(summary.rows)),
                *stages,
                Spread.of(polished).percent() if polished else "",
                Spread.of(finetuned).percent() if finetuned else "",
                f"{summary.of(lambda row: row.parameters).mean:,.0f}",
                " + ".join(f"{value:.1f}" for value in seconds),
            ]
        )
    header = ["method", "merge", "cycles", "calibration", "fewer MACs", "seeds"]
    header += ["pruned", "recalibrated", "polished", "finetuned", "parameters", "seconds: score + plan + merge"]
    return _table(header, lines)


def _names(cell: Cell) -> list[str]:
    return [f"`{cell.method}`", f"`{cell.merge}`", str(cell.cycles), f"{cell.calibration_size:,}"]


def _measured(results: Results) -> str:
    rows = results.rows
    images = min(row.images for row in rows)
    dense = Spread.of({row.dense for row in rows})
    error = 100 * math.sqrt(dense.mean * (1 - dense.mean) / images)
    splits = " and ".join(sorted({repr(row.split) for row in rows}))
    return (
        f"Top-1 accuracy in %, mean ± sample standard deviation over seeds, on {images:,} images of {splits}; dense "
        f"{dense.percent()}. Besides the spread over seeds, one accuracy has a standard error of at least {error:.2g} "
        "points from its test images.\nIn the second table, bold is the accuracy that the merge rule delivers (before or "
        "after BatchNorm recalibration);\nthat network is finetuned.\n"
    )


def _failures(results: Results) -> list[str]:
    return [f"Failed: {key}: {reason}\n" for key, reason in results.failed.items()]


def _table(header: list[str], lines: Iterable[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences of two settings, one text each: "learning_rate: 0.005 then, 0.01 now"."""
    keys = sorted(saved.keys() | now.keys())
    return [f"{key}: {saved.get(key)!r} then, {now.get(key)!r} now" for key in keys if saved.get(key) != now.get(key)]
