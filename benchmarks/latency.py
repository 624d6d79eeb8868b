"""Accuracy over measured milliseconds, without labels: plans for MACs, plans for latency, and torch-pruning's.

    python benchmarks/latency.py --data FOLDER [--rows 'latency*'] [--threads 2] [--no-timing] [--test]

Prunes cifar_resnet56 once for each row (networks are kept in --work, so that a row is pruned once; `polished` rows take the
label-free steps that a user gets unasked, all others do without), then times all of them in one run, taking turns: torch with
BatchNorm as it is and folded, and ONNX Runtime where it is installed, at batch 1 and 32.
Accuracy is that on held-out training images; --test adds that on the test images, for the final run. Results stand in
docs/results/latency.json, .md and .png. torch-pruning rows need `pip install torch-pruning==1.6.1`, ONNX Runtime
`pip install onnx onnxruntime onnxscript`.
"""

import argparse
import copy
import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from networks import NETWORKS, base_of, loaders_of
from torch import nn

from hf_camphive import CampHiVeConfig, CampHiVePruner
from hf_camphive.core.plan import Budget
from hf_camphive.core.runtime import environment, keep_freed_memory, make_accelerator
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.footprint import count_macs, count_parameters, measure_latency
from hf_camphive.network.surgery.folding import fold
from hf_camphive.pruning.planning.costs import CostModel
from hf_camphive.pruning.planning.latency.prediction import LatencyRequest, latency_terms
from hf_camphive.pruning.planning.latency.timing import LatencyTable
from hf_camphive.pruning.scoring.criteria import Scores
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.evaluation import evaluate_accuracy, recalibrate_batchnorm

RESULTS = Path(__file__).parent.parent / "docs" / "results"
NETWORK, SIZE, BATCHES = "cifar_resnet56", (3, 32, 32), (1, 32)
ENGINES = ("torch", "torch folded", "onnxruntime")


@dataclass(frozen=True)
class Job:
    """One row: how its network is pruned."""

    name: str
    options: dict = field(default_factory=dict)
    torch_pruning: dict | None = None


FEWER = (1.5, 2.1, 2.6, 4.2)
LATENCY = {"latency_folded": True, "latency_batch_size": 32}
POLISHED = {"polish_steps": 100}
JOBS = [
    Job("dense"),
    *(Job(f"macs {fewer}x", {"target_macs": 1 / fewer}) for fewer in FEWER),
    *(Job(f"macs {fewer}x in eights", {"target_macs": 1 / fewer, "round_to": 8}) for fewer in FEWER),
    *(
        Job(f"latency {share}", {"target_latency": share, **LATENCY})
        for share in (0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3)
    ),
    *(
        Job(f"latency {share} polished", {"target_latency": share, **LATENCY, **POLISHED})
        for share in (0.6, 0.5, 0.45, 0.35)
    ),
    *(
        Job(f"latency batch 1 {share}", {"target_latency": share, **LATENCY, "latency_batch_size": 1})
        for share in (0.8, 0.7, 0.6, 0.5, 0.4)
    ),
    *(
        Job(
            f"torch-pruning {fewer}x{' recalibrated' * recalibrated}",
            torch_pruning={"fewer": fewer, "again": recalibrated},
        )
        for recalibrated in (False, True)
        for fewer in FEWER
    ),
]


def main() -> None:
    """Prune, evaluate and time what is asked for, keeping each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets and weights")
    parser.add_argument("--rows", default="*", help="pattern of the rows to run and time (dense is always timed)")
    parser.add_argument("--work", type=Path, default=Path("outputs/latency"), help="folder of the pruned networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads while timing")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on each batch size and engine")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=ENGINES, help="engines to time (all)")
    parser.add_argument("--no-timing", action="store_true", help="only prune and evaluate")
    parser.add_argument("--test", action="store_true", help="evaluate on the test images as well")
    options = parser.parse_args()
    logging.getLogger("hf_camphive").setLevel(logging.WARNING)
    keep_freed_memory()
    torch.set_num_threads(options.threads)  # also while planning: a latency plan is for that many
    results = RESULTS / "latency.json"
    rows = json.loads(results.read_text()) if results.exists() else {}
    chosen = [job for job in JOBS if job.name == "dense" or fnmatchcase(job.name, options.rows)]
    if find_spec("torch_pruning") is None:
        chosen = [job for job in chosen if job.torch_pruning is None]
    for job in chosen:
        path = options.work / f"{job.name.replace(' ', '_')}.pt"
        if job.name not in rows or not path.exists():
            net, row = pruned(job, options.data)
            options.work.mkdir(parents=True, exist_ok=True)
            torch.save(net, path)
            rows[job.name] = row
        if options.test and "test_top1" not in rows[job.name]:
            rows[job.name]["test_top1"] = test_accuracy(torch.load(path, weights_only=False), options.data)
        keep(results, rows)
        print(job.name, {key: value for key, value in rows[job.name].items() if "top1" in key}, flush=True)
    if not options.no_timing:
        nets = {
            job.name: torch.load(options.work / f"{job.name.replace(' ', '_')}.pt", weights_only=False)
            for job in chosen
        }
        for engine in options.engine:
            if engine != "onnxruntime" or (find_spec("onnxruntime") and find_spec("onnx")):
                for name, found in timed(engine, nets, options.threads, options.seconds).items():
                    rows[name].setdefault("ms", {})[engine] = found
                rows["dense"]["environment"] = environment()
                keep(results, rows)
        rows["dense"]["blocks"] = block_times(options.data)
        keep(results, rows)
    print(table(rows))


def keep(results: Path, rows: dict[str, dict]) -> None:
    """Write the results, as data, table and picture."""
    rows = {job.name: rows[job.name] for job in JOBS if job.name in rows}
    RESULTS.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps(rows, indent=1) + "\n")
    results.with_suffix(".md").write_text(table(rows))
    if any("ms" in row for row in rows.values()):
        draw(rows, results.with_suffix(".png"))


def pruned(job: Job, data: Path) -> tuple[nn.Module, dict]:
    """The network of a row, and what is known of it before it is timed."""
    base = base_of(NETWORKS[NETWORK], data)
    loaders = loaders_of(NETWORK, data, 0)
    extra = {}
    if job.torch_pruning:
        net = with_torch_pruning(base.net, loaders, **job.torch_pruning)
    elif job.options:
        config = CampHiVeConfig(**{"num_train_epochs": 0, "polish_steps": 0, **job.options})
        pruner = CampHiVePruner(base, config)
        calibration, scores, seconds_to_score = scored(data, config.scored_by)
        plan = pruner.cycle.plan(calibration, scores=scores)
        net = pruner.apply(plan, calibration)
        if config.label_free_steps:
            net = pruner.polish(calibration)
        pruner.log.seconds["score"] = seconds_to_score
        extra = {
            "budgets": [vars(budget) for budget in plan.budgets],
            "dropped": len(plan.dropped),
            "seconds_by_step": {step: round(seconds, 1) for step, seconds in pruner.log.seconds.items()},
        }
    else:
        net = base.net
    held_out = evaluate_accuracy(net, loaders.validation, make_accelerator(CampHiVeConfig()), "validation")
    return net.eval(), {
        "macs": count_macs(net, SIZE),
        "parameters": count_parameters(net),
        "held_out_top1": held_out.top1,
        "held_out_images": held_out.images,
        **extra,
    }


@cache
def scored(data: Path, criterion: str) -> tuple[Calibration, Scores, float]:
    """Calibration images, the scores of the dense network, which plans share, and the seconds that these took."""
    calibration = Calibration.collect(loaders_of(NETWORK, data, 0).calibration)
    pruner = CampHiVePruner(base_of(NETWORKS[NETWORK], data), CampHiVeConfig(num_train_epochs=0, criterion=criterion))
    pruner.plan(calibration)
    return calibration, pruner.scores, pruner.log.seconds["score"]


def test_accuracy(net: nn.Module, data: Path) -> float:
    """Top-1 on the 10,000 test images."""
    loader, split = loaders_of(NETWORK, data, 0).evaluation
    return evaluate_accuracy(net, loader, make_accelerator(CampHiVeConfig()), split).top1


def with_torch_pruning(dense: nn.Module, loaders, fewer: float, again: bool) -> nn.Module:
    """torch-pruning's global plan by magnitude at so many times fewer MACs; `again` recalibrates BatchNorm afterwards."""
    import torch_pruning as tp  # installed for this benchmark only

    net, example = copy.deepcopy(dense).eval(), torch.zeros(1, *SIZE)
    target = count_macs(net, SIZE) / fewer
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    pruner = tp.pruner.BasePruner(
        net,
        example,
        importance=importance,
        global_pruning=True,
        pruning_ratio=0.95,
        iterative_steps=400,
        ignored_layers=[net.fc],
    )
    while count_macs(net, SIZE) > target:
        pruner.step()
    if again:
        recalibrate_batchnorm(net, list(loaders.calibration), make_accelerator(CampHiVeConfig()))
    return net


# Timing


def timed(engine: str, nets: dict[str, nn.Module], threads: int, seconds: float) -> dict[str, dict]:
    """{row: {batch size: median, 10th and 90th percentile in ms, runs}} of one engine, the rows taking turns."""
    if engine == "onnxruntime":
        return timed_with_onnxruntime(nets, threads, seconds)
    if engine == "torch folded":
        nets = {name: fold(net, SIZE) for name, net in nets.items()}
    found = measure_latency(nets, SIZE, BATCHES, runs=1000, seconds=seconds)
    return {name: {str(batch): vars(latency) for batch, latency in row.items()} for name, row in found.items()}


def block_times(data: Path) -> dict[str, dict[str, float]]:
    """{block: {channels inside: ms}} of a residual block of each stage, folded, at batch 32, by the table that plans read."""
    net = base_of(NETWORKS[NETWORK], data).net.eval()
    analysis = NetworkAnalysis.of(net, SIZE)
    floor = CostModel.of(analysis).floors(CampHiVeConfig())
    parts = latency_terms(net, analysis, LatencyTable(), LatencyRequest(floor, batch=32, folded=True, step=8))
    sizes = {group.name: group.size for group in analysis.groups}
    times = {}
    for branch in {branch.module.split(".")[0]: branch for branch in analysis.branches}.values():
        (inside,) = branch.gates
        times[branch.module] = {
            str(kept): sum(part.at(sizes | {inside: kept}, ()) for part in parts if part.branch == branch.module)
            for kept in range(8, sizes[inside] + 1, 8)
        }
    return times


def timed_with_onnxruntime(nets: dict[str, nn.Module], threads: int, seconds: float) -> dict[str, dict]:
    """The same with ONNX Runtime, of the exported network with BatchNorm folded."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.force_spinning_stop", "1")  # else idle sessions take the others' cores
    found: dict[str, dict] = {name: {} for name in nets}
    for batch in BATCHES:
        images = torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(0))
        runs: dict[str, Callable[[], object]] = {}
        for name, net in nets.items():
            session = onnxruntime.InferenceSession(exported(net, images), settings, providers=["CPUExecutionProvider"])
            inputs = {session.get_inputs()[0].name: images.numpy()}
            with torch.no_grad():
                expected = net.eval()(images).numpy()
            np.testing.assert_allclose(session.run(None, inputs)[0], expected, rtol=1e-2, atol=1e-2)
            runs[name] = lambda session=session, inputs=inputs: session.run(None, inputs)
        times: dict[str, list[float]] = {name: [] for name in nets}
        began = time.perf_counter()
        while time.perf_counter() - began < seconds or len(times["dense"]) < 5:
            for name, run in runs.items():
                run()  # finds the caches full of the network before
                start = time.perf_counter()
                run()
                times[name].append(1000 * (time.perf_counter() - start))
        for name, values in times.items():
            low, median, high = map(float, np.percentile(values[1:], (10, 50, 90)))
            found[name][str(batch)] = {"median": median, "low": low, "high": high, "runs": len(values) - 1}
    return found


def exported(net: nn.Module, images: torch.Tensor) -> bytes:
    """The network as ONNX for batches of this size."""
    folded = fold(net, SIZE).to(memory_format=torch.contiguous_format)
    buffer = io.BytesIO()
    torch.onnx.export(folded, (images,), dynamo=True, verbose=False).save(buffer)
    return buffer.getvalue()


# Reports


def table(rows: dict[str, dict]) -> str:
    """Rows as Markdown."""
    columns = [(engine, batch) for engine in ENGINES for batch in BATCHES]
    lines = [
        "| row | fewer MACs | held-out top-1 | test top-1 | branches gone | predicted ms | "
        + " | ".join(f"{engine}, batch {batch}: ms" for engine, batch in columns)
        + " |",
        "|---" * (6 + len(columns)) + "|",
    ]
    for name, row in rows.items():
        predicted = next((Budget(**b) for b in row.get("budgets", ()) if b["cost"] == "latency"), None)
        cells = [
            name,
            f"{rows['dense']['macs'] / row['macs']:.2f}x",
            f"{100 * row['held_out_top1']:.2f}",
            f"{100 * row['test_top1']:.2f}" if "test_top1" in row else "",
            str(row.get("dropped", "")),
            "" if predicted is None else f"{predicted.after:.1f}, {predicted.before / predicted.after:.2f}x",
            *(times(rows, name, engine, str(batch)) for engine, batch in columns),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    blocks = rows["dense"].get("blocks", {})
    if blocks:
        lines += ["", "What a residual block takes, by its inner channels (torch folded, batch 32, predicted):", ""]
    for block, found in blocks.items():
        *_, (full, whole) = found.items()
        shares = (f"{int(kept) / int(full):.0%} of the channels {ms / whole:.0%}" for kept, ms in found.items())
        lines.append(f"- `{block}`, {whole:.2f} ms: {', '.join(shares)}")
    timed_on = ", ".join(f"{key} {value}" for key, value in rows["dense"].get("environment", {}).items())
    return "\n".join(lines) + f"\n\n{timed_on or 'Not timed yet'}.\n"


def times(rows: dict[str, dict], name: str, engine: str, batch: str) -> str:
    """Median and spread, and how many times faster than the dense network of the same run."""
    found, dense = (rows[row].get("ms", {}).get(engine, {}).get(batch) for row in (name, "dense"))
    if not found or not dense:
        return ""
    faster = f", {dense['median'] / found['median']:.2f}x" if name != "dense" else ""
    return f"{found['median']:.1f} ({found['low']:.1f} to {found['high']:.1f}){faster}"


def draw(rows: dict[str, dict], path: Path) -> None:
    """Accuracy over measured milliseconds, one panel for each engine and batch size, one line for each way to plan."""
    ways = ("latency batch 1", "latency", "latency polished", "macs in eights", "macs")
    ways += ("torch-pruning recalibrated", "torch-pruning")
    accuracy = "test_top1" if all("test_top1" in row for row in rows.values()) else "held_out_top1"
    figure, panels = plt.subplots(len(BATCHES), len(ENGINES), figsize=(12, 7), sharey=True, layout="constrained")
    for i, batch in enumerate(BATCHES):
        for j, engine in enumerate(ENGINES):
            for way in ways:
                points = sorted(
                    (row["ms"][engine][str(batch)]["median"], 100 * row[accuracy])
                    for name, row in rows.items()
                    if way_of(name) == way and engine in row.get("ms", {})
                )
                if points:
                    panels[i, j].plot(*zip(*points), marker="o", markersize=3, label=way)
            if engine in rows["dense"].get("ms", {}):
                panels[i, j].axvline(rows["dense"]["ms"][engine][str(batch)]["median"], color="grey", linestyle=":")
            panels[i, j].set(title=f"{engine}, batch {batch}", ylim=(60, 95))
    figure.supxlabel("milliseconds a batch, measured (dotted: dense)")
    figure.supylabel(f"top-1 without finetuning, % ({accuracy.replace('_top1', '').replace('_', '-')} images)")
    panels[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def way_of(name: str) -> str:
    """A row's name without its budget."""
    return " ".join(word for word in name.split() if not word.rstrip("x").replace(".", "").isdigit() or word == "1")


if __name__ == "__main__":
    main()
