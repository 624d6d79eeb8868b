"""The report of a run, as data, as JSON and as a table: accuracy and footprint of each stage, and the cut of each group."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hf_camphive.core.errors import ModelError
from hf_camphive.core.measures import (
    NOT_MEASURED,
    Accuracy,
    Footprint,
    Latency,
    format_bytes,
    format_cost,
    format_count,
    format_ms,
    format_share,
)
from hf_camphive.core.plan import Budget
from hf_camphive.core.records import RecordFormat

REPORT_FILE = "report.json"
FORMAT = RecordFormat(REPORT_FILE, ModelError, indent=2)
TABLE_WIDTH = 100
BOTTLENECK_SHARE = 0.5


@dataclass(frozen=True)
class Stage:
    """The network at one point of the run: "dense", "pruned", "polished" or "finetuned".

    `accuracy` is None where it was not measured.
    """

    name: str
    footprint: Footprint
    accuracy: Accuracy | None


@dataclass(frozen=True)
class GroupRow:
    """Channels of a group before the first cycle (`size`) and after the last (`kept`).

    `frozen` is the reason why the group could not be cut, or None; `in_scope` is False where the config's `scope`
    excludes it.
    """

    name: str
    size: int
    kept: int
    frozen: str | None
    in_scope: bool = True


@dataclass(frozen=True)
class GroupRatio:
    """Share of a group's channels that was removed, in [0, 1], and whether the group is a bottleneck."""

    group: str
    ratio: float
    bottleneck: bool


@dataclass(frozen=True)
class PruneReport:
    """Settings, measurements and outcome of a run; equal to the report read back from its JSON.

    `input_size` is (channels, height, width), `splits` and `rows` are keyed by role (calibration, train, ...), `seconds`
    by step. `budgets` cover all cycles; latency in them is predicted. `tuning` holds the method's fixed numbers that change
    results (`pruning.tuning`), empty in reports written before they were recorded.
    """

    model_id: str
    revision: str | None
    architecture: str
    license: str | None
    dataset_id: str
    dataset_revision: str | None
    splits: dict[str, str]
    rows: dict[str, int]
    input_size: tuple[int, int, int]
    stages: tuple[Stage, ...]
    config: dict[str, Any]
    command: str
    head_replaced: bool = False
    groups: tuple[GroupRow, ...] = ()
    dropped: tuple[str, ...] = ()
    budgets: tuple[Budget, ...] = ()
    notes: tuple[str, ...] = ()
    finetune: dict[str, Any] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)

    def pruning_ratios(self) -> tuple[GroupRatio, ...]:
        """Return the pruning ratio of each group that could be cut, lowest first.

        Bottlenecks are those of SOSP's expand-pruning (arXiv:2110.11395): where a global criterion removes little, the
        network is too narrow. Deviation: the paper reads such layers off a plot; here a bottleneck lost less than
        `BOTTLENECK_SHARE` times the share that all these groups lost together.
        """
        rows = [row for row in self.groups if row.in_scope and not row.frozen]
        overall = 1 - sum(row.kept for row in rows) / max(1, sum(row.size for row in rows))
        ratios = [(1 - row.kept / row.size, row.name) for row in rows]
        ratios.sort(key=lambda pair: pair[0])  # stable: forward order among equals
        return tuple(GroupRatio(name, ratio, ratio < BOTTLENECK_SHARE * overall) for ratio, name in ratios)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, the number of their layout and the pruning ratios, as `report.json` holds them."""
        return {"schema": FORMAT.schema, **self._values()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "PruneReport":
        """Rebuild a report from `to_dict`.

        Raises:
            ModelError: A key is missing or unknown, or the schema is another one.
        """
        return FORMAT.restore(values, cls._from_values)

    def to_json(self) -> str:
        """Return the text of `report.json`."""
        return FORMAT.write(self._values())

    @classmethod
    def from_json(cls, text: str | bytes) -> "PruneReport":
        """Read the text of `report.json`.

        Raises:
            ModelError: The text is damaged, or `from_dict` refuses its values.
        """
        return FORMAT.read(text, cls._from_values)

    def _values(self) -> dict[str, Any]:
        return {**asdict(self), "pruning_ratios": [asdict(row) for row in self.pruning_ratios()]}

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> "PruneReport":
        rest = {key: value for key, value in values.items() if key != "pruning_ratios"}  # which follow from the groups
        return cls(
            **rest
            | {
                "input_size": tuple(values["input_size"]),
                "stages": tuple(map(_stage_from, values["stages"])),
                "groups": tuple(GroupRow(**row) for row in values["groups"]),
                "dropped": tuple(values["dropped"]),
                "budgets": tuple(Budget(**budget) for budget in values.get("budgets", ())),
                "notes": tuple(values["notes"]),
            }
        )

    def table(self) -> str:
        """Return the report for the terminal: a title, the table of stages, and the budgets."""
        size = "x".join(str(n) for n in self.input_size)
        title = _wrap(f"{self.model_id} on {self.dataset_id}, images of {size}")
        lines = [*title, "", stages_table(self.stages, self.environment)]
        return "\n".join(lines + [line for budget in self.budgets for line in _wrap(budget_text(budget))])

    def batch_sizes(self) -> list[int]:
        """Return the batch sizes whose latency was measured at any stage."""
        return _batch_sizes(self.stages)


def budget_text(budget: Budget) -> str:
    """Return a budget in a sentence: the target and the value under the plan."""
    said = "predicted" if budget.cost == "latency" else "planned"
    return (
        f"Budget: at most {format_cost(budget.cost, budget.target)} ({budget.target / budget.before:.1%} of the dense "
        f"network's); {said}: {format_cost(budget.cost, budget.after)} ({budget.after / budget.before:.1%})."
    )


def stages_table(stages: Sequence[Stage], environment: Mapping[str, str]) -> str:
    """Return the stages side by side; the last column compares the last stage with the first.

    `environment` is that of `core.runtime.environment`, for the notes below the table, which are wrapped at
    `TABLE_WIDTH` characters.
    """
    rows = [["", *(stage.name for stage in stages)]]
    changes = ["change"]
    for label, value, show, compare in _quantities(stages):
        values = [value(stage) for stage in stages]
        rows.append([label, *(NOT_MEASURED if v is None else show(v) for v in values)])
        changes.append("" if values[0] is None or values[-1] is None else compare(values[0], values[-1]))
    if len(stages) > 1:
        rows = [[*row, change] for row, change in zip(rows, changes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:], rule, *_table_notes(stages, environment)])


def _batch_sizes(stages: Sequence[Stage]) -> list[int]:
    return sorted({batch for stage in stages for batch in stage.footprint.latency_ms})


def _quantities(stages: Sequence[Stage]) -> list[tuple[str, Callable, Callable, Callable]]:
    """Return the table's rows: label, value of a stage (or None), its text, text of a change."""

    def accuracy(key: str) -> Callable[[Stage], float | None]:
        return lambda stage: None if stage.accuracy is None else getattr(stage.accuracy, key)

    def latency(batch: int) -> Callable[[Stage], float | None]:
        return lambda stage: getattr(stage.footprint.latency_ms.get(batch), "median", None)

    def folded(batch: int) -> Callable[[Stage], float | None]:
        return lambda stage: getattr(stage.footprint.folded_ms.get(batch), "median", None)

    batches = [
        (f"latency, batch {batch}", latency(batch), format_ms, _ratio("faster", "slower"))
        for batch in _batch_sizes(stages)
    ]
    batches += [
        (f"the same, folded, batch {batch}", folded(batch), format_ms, _ratio("faster", "slower"))
        for batch in sorted({batch for stage in stages for batch in stage.footprint.folded_ms})
    ]
    return [
        ("top-1", accuracy("top1"), format_share, _points),
        ("top-5", accuracy("top5"), format_share, _points),
        ("MACs per image", lambda stage: stage.footprint.macs, format_count, _ratio("fewer", "more")),
        ("parameters", lambda stage: stage.footprint.parameters, format_count, _ratio("fewer", "more")),
        *(batches or [("latency", lambda stage: None, format_ms, _points)]),
        ("file size", lambda stage: stage.footprint.file_bytes, format_bytes, _ratio("smaller", "larger")),
    ]


def _table_notes(stages: Sequence[Stage], environment: Mapping[str, str]) -> list[str]:
    notes = []
    measured = [stage.accuracy for stage in stages if stage.accuracy is not None]
    if measured:
        sets = {(accuracy.images, accuracy.split) for accuracy in measured}
        said = [f"{images:,} images of {split!r}" for images, split in sorted(sets)]
        error = 100 * measured[-1].standard_error
        notes.append(f"Accuracy on {' and '.join(said)}; standard error of top-1: {error:.2g} points.")
    runs = [latency.runs for stage in stages for latency in stage.footprint.latency_ms.values()]
    if runs:
        count = f"{min(runs)}" if min(runs) == max(runs) else f"{min(runs)} to {max(runs)}"
        where = [environment[key] for key in ("device", "threads") if key in environment]
        threads = f"{where[1]} thread{'s' if where[1] != '1' else ''}" if len(where) == 2 else ""
        place = ", ".join(part for part in (where[0] if where else "", threads) if part)
        notes.append(f"Latency: median of {count} interleaved runs{f' on {place}' if place else ''}.")
    if any(stage.footprint.folded_ms for stage in stages):
        notes.append("Folded: BatchNorm and what dropped blocks left folded into convolutions, as in deployment.")
    notes.append("1 MAC = 2 FLOPs; 1 MB = 10^6 bytes.")
    return [line for note in notes for line in _wrap(note)]


def _stage_from(values: Mapping[str, Any]) -> Stage:
    cost = values["footprint"]
    latency = {int(batch): Latency(**row) for batch, row in cost["latency_ms"].items()}
    folded = {int(batch): Latency(**row) for batch, row in cost.get("folded_ms", {}).items()}
    accuracy = values["accuracy"]
    return Stage(
        values["name"],
        Footprint(**cost | {"latency_ms": latency, "folded_ms": folded}),
        None if accuracy is None else Accuracy(**accuracy),
    )


def _points(before: float, after: float) -> str:
    return f"{100 * (after - before):+.2f} points"


def _ratio(better: str, worse: str) -> Callable[[float, float], str]:
    """Return a function that words the change of a cost: how many times `better` or `worse`."""

    def compare(before: float, after: float) -> str:
        if not before or not after or f"{before / after:.2f}" == f"{after / before:.2f}" == "1.00":
            return "unchanged"
        return f"{before / after:.2f}x {better}" if after < before else f"{after / before:.2f}x {worse}"

    return compare


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, TABLE_WIDTH, break_on_hyphens=False)
