"""The model card: a report in words, for whoever finds the model on the Hub.

States only what the report holds; the rest is left out or listed as not measured. Method names are worded by the rows in
`core/methods.py`.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_camphive.core.measures import (
    NOT_MEASURED,
    format_bytes,
    format_count,
    format_ms,
    format_precision,
    format_share,
)
from hf_camphive.core.methods import CRITERIA, EIGENSOLVERS, MERGE_RULES, PAPER
from hf_camphive.hub.report import GroupRatio, PruneReport, Stage, budget_text
from hf_camphive.network.surgery.widening import Expansion

TEMPLATE = Path(__file__).with_name("card_template.md")
FOLDER_PLACEHOLDER = "path/to/this/folder"  # in place of the repository's name, which a push gives the uploaded card
BATCH_SIZES = (1, 32)
MAX_BOTTLENECKS = 5
_CAPTIONS = {  # in the order of the card
    "summary.png": "Accuracy and cost of each stage, relative to the dense network",
    "widths.png": "Channels kept in each group, in forward order",
    "ratios.png": "Share of channels removed from each group, least pruned first",
    "finetune.png": "Loss and accuracy while finetuning",
    "scores.png": "Sorted channel scores of each group",
}
_THRESHOLDS = {
    "adaptive": ", per {unit} saved",
    "global": "",
    "percentile": ", within their own group: every group lost the same share",
}
_BIBTEX = """\
```bibtex
@misc{uddin2025camphive,
  title  = {CAMP-HiVe: Cyclic Pair Merging based Efficient DNN Pruning with Hessian-Vector Approximation
            for Resource-Constrained Systems},
  author = {Uddin, Mohammad Helal and Ghanta, Sai Krishna and Seymour, Liam and Baidya, Sabur},
  year   = {2025},
  eprint = {2511.06265},
  archivePrefix = {arXiv}
}
```"""


def render_card(report: PruneReport, repo_id: str | None, plots: Sequence[str] = ()) -> str:
    """Return the text of README.md: metadata for the Hub, then the card.

    `plots` are file names in the folder's `plots/`. Without a `repo_id` the load snippet names `FOLDER_PLACEHOLDER`.
    """
    name = repo_id.split("/")[-1] if repo_id else f"{_short(report.model_id)}-camphive"
    source = repo_id or FOLDER_PLACEHOLDER
    card = ModelCard.from_template(
        _metadata(report, name),
        template_path=str(TEMPLATE),
        title=name,
        summary=_summary(report),
        source=source,
        other_readers=_other_readers(source),
        table=_table(report),
        table_notes=_table_notes(report),
        plots=_pictures(plots),
        method=_method(report),
        command=report.command or "not recorded: made from Python, with the settings below",
        steps=_steps(report),
        data=_data(report),
        not_measured=_bullets(_not_measured(report)),
        limits=_bullets(_limits(report)),
        license_text=_license(report),
        citation=f"The idea of curvature scores and merging is that of {PAPER}; this is another implementation.\n\n"
        + _BIBTEX,
    )
    return str(card)


def name_source(card: str, repo_id: str) -> str:
    """Have a rendered card load the model from this repo, instead of from a folder or another repo."""
    snippet = re.search(r'hf_camphive\.from_pretrained\("([^"]+)"\)', card)
    source = snippet[1] if snippet else FOLDER_PLACEHOLDER
    return re.sub(rf'((?:from_pretrained\(|model=)"|"hf-hub:){re.escape(source)}"', rf'\g<1>{repo_id}"', card)


def render_expansion_card(expansion: Expansion) -> str:
    """Return the text of README.md for a widened network, which is to be trained and pruned again."""
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["timm", "camphive"],
        "license": expansion.license,
    }
    if _is_hub_id(expansion.model_id):
        values |= {"base_model": expansion.model_id, "base_model_relation": "finetune"}
    macs = format_count(expansion.macs_before), format_count(expansion.macs_after)
    parameters = format_count(expansion.parameters_before), format_count(expansion.parameters_after)
    rows = [f"| `{w.group}` | {w.size} | {len(w.sources)} |" for w in expansion.widenings]
    lines = [
        f"---\n{ModelCardData(**values)}\n---\n",
        f"# {_short(expansion.model_id)}, widened\n",
        f"{_link(expansion.model_id)} with channels split into copies (Net2WiderNet, arXiv:1511.05641): the same "
        "function in more channels, to be trained further and pruned again. It is larger than its base and no better.\n",
        f"MACs per image: {macs[0]} before, {macs[1]} now. Parameters: {parameters[0]} before, {parameters[1]} now. "
        f"Settings: `factor={expansion.factor}`, `spread={expansion.spread}`, `seed={expansion.seed}`; "
        "`expansion.json` lists every copy.\n",
        "| channel group | before | now |\n| --- | ---: | ---: |",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def _metadata(report: PruneReport, name: str) -> ModelCardData:
    values: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": [
            *("timm", "pruning", "unstructured-pruning" if _zeroes_weights(report) else "structured-pruning"),
            "camphive",
        ],
        "license": report.license,  # left out when None
    }
    if _is_hub_id(report.model_id):
        values |= {"base_model": report.model_id, "base_model_relation": "finetune"}
    if _is_hub_id(report.dataset_id):
        values["datasets"] = [report.dataset_id]
    accuracy = report.stages[-1].accuracy
    if accuracy is not None:
        common: dict[str, Any] = {
            "task_type": "image-classification",
            "dataset_type": _shown(report.dataset_id),
            "dataset_name": _short(report.dataset_id),
            "dataset_split": accuracy.split,
            "dataset_revision": report.dataset_revision,
            "metric_type": "accuracy",
        }
        values |= {
            "metrics": ["accuracy"],
            "model_name": name,
            "eval_results": [
                EvalResult(metric_name="Top-1", metric_value=accuracy.top1, **common),
                EvalResult(metric_name="Top-5", metric_value=accuracy.top5, **common),
            ],
        }
    return ModelCardData(**values)


def _summary(report: PruneReport) -> str:
    dense, last = report.stages[0], report.stages[-1]
    if _zeroes_weights(report):
        return _zeros_summary(report)
    macs = format_count(dense.footprint.macs), format_count(last.footprint.macs)
    text = (
        f"{_link(report.model_id)} made smaller by structured pruning: whole channels are removed, not set to zero. "
        f"An image takes {macs[1]} MACs instead of {macs[0]}{_time_taken(report)}"
    )
    if dense.accuracy is None or last.accuracy is None:
        return text + "."
    top1 = format_share(dense.accuracy.top1), format_share(last.accuracy.top1)
    return text + f"; top-1 accuracy on {_link(report.dataset_id, 'datasets/')} is {top1[1]} instead of {top1[0]}."


def _time_taken(report: PruneReport) -> str:
    """The measured time of the batch that a budget of milliseconds was given for; nothing without such a budget."""
    batch, folded = report.config.get("latency_batch_size", 0), report.config.get("latency_folded")
    before, after = (
        (stage.footprint.folded_ms if folded else stage.footprint.latency_ms).get(batch)
        for stage in (report.stages[0], report.stages[-1])
    )
    if report.config.get("target_latency") is None or before is None or after is None:
        return ""
    how = ", folded as for deployment," if folded else ""
    times = f"{format_ms(after.median)} instead of {format_ms(before.median)}"
    return f", and a batch of {batch}{how} takes {times}{_place(report)}"


def _zeroes_weights(report: PruneReport) -> bool:
    return report.config.get("granularity") == "weight"


def _zeros_summary(report: PruneReport) -> str:
    dense, last = report.stages[0].accuracy, report.stages[-1].accuracy
    text = (
        f"{_link(report.model_id)} with {report.config['sparsity']:.0%} of each layer's weights set to zero. It is no "
        "smaller and no faster than its base: MACs, time and file size are the same"
    )
    if dense is None or last is None:
        return text + "."
    top1 = format_share(dense.top1), format_share(last.top1)
    return text + f". Top-1 accuracy on {_link(report.dataset_id, 'datasets/')} is {top1[1]} instead of {top1[0]}."


def _other_readers(source: str) -> str:
    return (
        f'With the package imported, `AutoModelForImageClassification.from_pretrained("{source}")`, '
        f'`pipeline("image-classification", model="{source}")` and '
        f'`timm.create_model("hf-hub:{source}", pretrained=True)` (a local folder: `local-dir:`) give the same '
        "logits. Without it, transformers needs `trust_remote_code=True`, which runs the small Python files "
        "stored here."
    )


def _table(report: PruneReport) -> str:
    """Return the stages side by side in Markdown; the last column compares the last stage with the first."""
    stages = report.stages

    def accuracy(key: str) -> Callable[[Stage], float | None]:
        return lambda stage: getattr(stage.accuracy, key, None)

    def latency(batch: int) -> Callable[[Stage], float | None]:
        return lambda stage: getattr(stage.footprint.latency_ms.get(batch), "median", None)

    def folded(batch: int) -> Callable[[Stage], float | None]:
        return lambda stage: getattr(stage.footprint.folded_ms.get(batch), "median", None)

    batches = sorted({*BATCH_SIZES, *report.batch_sizes()})
    folded_batches = sorted({batch for stage in stages for batch in stage.footprint.folded_ms})
    rows: list[tuple[str, Callable[[Stage], Any], Callable[[Any], str], Callable[[Any, Any], str]]] = [
        ("Top-1 accuracy", accuracy("top1"), format_share, _points),
        ("Top-5 accuracy", accuracy("top5"), format_share, _points),
        ("MACs per image", lambda stage: stage.footprint.macs, format_count, _times),
        ("Parameters", lambda stage: stage.footprint.parameters, format_count, _times),
        *((f"Latency, batch {batch}", latency(batch), format_ms, _times) for batch in batches),
        *(
            (f"Latency, batch {batch}, folded as for deployment", folded(batch), format_ms, _times)
            for batch in folded_batches
        ),
        ("Weights file", lambda stage: stage.footprint.file_bytes, format_bytes, _times),
    ]
    lines = [["", *(stage.name for stage in stages), "change"], ["---", *["---:"] * (len(stages) + 1)]]
    for label, value, show, compare in rows:
        values = [value(stage) for stage in stages]
        change = "—" if None in (values[0], values[-1]) else compare(values[0], values[-1])
        lines.append([label, *(NOT_MEASURED if v is None else show(v) for v in values), change])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _pictures(plots: Sequence[str]) -> list[dict[str, str]]:
    known = [plot for plot in _CAPTIONS if plot in plots]
    rest = [plot for plot in plots if plot not in _CAPTIONS]
    return [{"path": f"plots/{plot}", "caption": _CAPTIONS.get(plot, PurePath(plot).stem)} for plot in (*known, *rest)]


def _points(before: float, after: float) -> str:
    return f"{100 * (after - before):+.2f} points"


def _times(before: float, after: float) -> str:
    if before == after:
        return "unchanged"
    return f"{before / after:.2f}x less" if after < before else f"{after / before:.2f}x more"


def _table_notes(report: PruneReport) -> str:
    notes = [f"Images are {'x'.join(str(n) for n in report.input_size)} (channels, height, width); 1 MAC = 2 FLOPs."]
    accuracies = [stage.accuracy for stage in report.stages if stage.accuracy is not None]
    for images, split in sorted({(accuracy.images, accuracy.split) for accuracy in accuracies}):
        notes.append(f"Accuracy: {images:,} images of split `{split}`.")
    if accuracies:
        notes.append(f"Standard error of top-1: {100 * accuracies[-1].standard_error:.2g} points.")
    runs = [latency.runs for stage in report.stages for latency in stage.footprint.latency_ms.values()]
    if runs:
        notes.append(f"Latency: median of at least {min(runs)} runs{_place(report)}, the networks taking turns.")
    return " ".join(notes)


def _method(report: PruneReport) -> str:
    criterion, merge = report.config["criterion"], report.config["merge"]
    if _zeroes_weights(report):
        return (
            f"Weights were ranked, tensor by tensor, by the size of their entries in the dominant eigenvector of the "
            f"loss's curvature, after {PAPER}; of the lowest, which are zero now, {MERGE_RULES[merge].weight_wording} "
            f"(`granularity=weight`, `criterion={criterion}`, `merge={merge}`)."
        )
    threshold = _THRESHOLDS[report.config.get("threshold", "adaptive")].format(unit=_per(report))
    return (
        f"Channels were ranked by {_ranking(report)}{threshold}; {MERGE_RULES[merge].wording} "
        f"(`criterion={criterion}`, `merge={merge}`)."
    )


def _ranking(report: PruneReport) -> str:
    row = CRITERIA[report.config["criterion"]]
    wording = row.wording.replace("{eigensolver}", EIGENSOLVERS[report.config["eigensolver"]])
    return f"{wording} ({row.source})" if row.source else wording


def _per(report: PruneReport) -> str:
    units = {"macs": "MAC", "params": "parameter", "latency": "predicted millisecond"}
    return " and ".join(units[budget.cost] for budget in report.budgets) or "MAC"


def _steps(report: PruneReport) -> str:
    items = []
    cut = [group for group in report.groups if group.kept < group.size]
    if cut:
        removed = sum(group.size - group.kept for group in cut)
        items.append(f"{removed:,} channels removed from {len(cut)} of {len(report.groups)} channel groups.")
    if bottlenecks := [row for row in report.pruning_ratios() if row.bottleneck]:
        items.append(_bottlenecks(bottlenecks))
    if report.dropped:
        items.append(f"Residual branches removed whole: {', '.join(f'`{name}`' for name in report.dropped)}.")
    if report.head_replaced:
        items.append("The base's classifier was replaced and trained for this dataset before pruning.")
    if report.finetune is None:
        items.append("No finetuning after pruning.")
    else:
        settings = _settings(report, "num_train_epochs learning_rate optimizer distillation label_smoothing")
        precision = format_precision(report.finetune["mixed_precision"])
        items.append(f"Finetuned in {precision} ({settings}); the last epoch is reported, not the best.")
    items += map(budget_text, report.budgets)
    settings = _settings(report, f"{'sparsity' if _zeroes_weights(report) else 'cycles'} calibration_size seed")
    items.append(f"Settings: {settings}; all of them in `camphive_config.json`.")
    items.append(_labels(report))
    items.append("`prune_plan.json` lists every cut, `report.json` every figure.")
    revision = f"`{report.revision}`" if report.revision else "not recorded"
    items.append(f"Revision of the base: {revision}. Architecture: timm `{report.architecture}`.")
    if report.environment:
        items.append(f"Environment: {', '.join(f'{key} {value}' for key, value in report.environment.items())}.")
    items.extend(report.notes)
    return _bullets(items)


def _labels(report: PruneReport) -> str:
    row = CRITERIA[report.config["criterion"]]
    if row.reads_labels or (row.uses_curvature and report.config["curvature"] == "hessian"):
        return "Scoring read the labels of the calibration images; merging read none."
    return "Scoring and merging read no labels."


def _bottlenecks(rows: Sequence[GroupRatio]) -> str:
    shown = ", ".join(f"`{row.group}` ({100 * row.ratio:.0f} %)" for row in rows[:MAX_BOTTLENECKS])
    more = f" and {len(rows) - MAX_BOTTLENECKS} more" if len(rows) > MAX_BOTTLENECKS else ""
    return (
        f"Bottlenecks, which lost less than half the share of channels that all groups lost together: {shown}{more}. "
        "`camphive expand --from` this folder widens them."
    )


def _settings(report: PruneReport, keys: str) -> str:
    return ", ".join(f"`{key}={report.config[key]}`" for key in keys.split())


def _data(report: PruneReport) -> str:
    if not report.splits:
        return "The images used for scoring and repair were not recorded."
    revision = f", revision `{report.dataset_revision}`" if report.dataset_revision else ""
    lines = [f"{_link(report.dataset_id, 'datasets/')}{revision}.", ""]
    lines += ["| used as | split | images |", "| --- | --- | ---: |"]
    for role, split in report.splits.items():
        rows = f"{report.rows[role]:,}" if role in report.rows else "not counted"
        lines.append(f"| {role} | {split} | {rows} |")
    return "\n".join(lines)


def _not_measured(report: PruneReport) -> list[str]:
    items = [f"Accuracy of the {stage.name} network." for stage in report.stages if stage.accuracy is None]
    for batch in BATCH_SIZES:
        missing = [stage.name for stage in report.stages if batch not in stage.footprint.latency_ms]
        if missing:
            items.append(f"Latency at batch size {batch} of the {' and '.join(missing)} network.")
    items.append("Latency on other devices, memory use and energy.")
    items.append("Robustness to other data, calibration of the probabilities, and accuracy of single classes.")
    return items


def _limits(report: PruneReport) -> list[str]:
    data = _shown(report.dataset_id) if report.splits else "the data that it was calibrated on"
    return [
        f"Pruning fits the network to {data}: elsewhere it may lose more than the table shows, "
        "and rare classes may lose more than common ones.",
        "It inherits the biases and the license of its base and of the data.",
        "Zeros in the weights save nothing on ordinary hardware."
        if _zeroes_weights(report)
        else "Fewer MACs need not mean less time: measure latency on your own device.",
    ]


def _license(report: PruneReport) -> str:
    if report.license is not None:
        return f"`{report.license}`, as the base model."
    return "The license of the base model is not known here. Find it out before you use or share this model."


def _place(report: PruneReport) -> str:
    device, threads = report.environment.get("device"), report.environment.get("threads")
    parts = [device] if device else []
    if threads:
        parts.append(f"{threads} thread{'s' if threads != '1' else ''}")
    return f" on {', '.join(parts)}" if parts else ""


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def _short(name: str) -> str:
    return PurePath(name).name or name


def _shown(name: str) -> str:
    """Return a Hub id unchanged, and only the last part of a local path, which is private."""
    return name if _is_hub_id(name) else _short(name)


def _link(name: str, kind: str = "") -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if _is_hub_id(name) else f"`{_shown(name)}`"


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)
