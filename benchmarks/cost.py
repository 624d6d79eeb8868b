"""What the default costs before any training: seconds of each step, and the most memory that its process held.

    python benchmarks/cost.py --data FOLDER [--network NAME ...] [--threads 2]

Each network is pruned once, in a process of its own. Results stand in docs/results/cost.json and .md. Use an idle machine.
"""

import argparse
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from measuring import resident_bytes
from networks import NETWORKS, base_of, loaders_of

from hf_camphive import CampHiVeConfig, CampHiVePruner
from hf_camphive.core.runtime import environment, keep_freed_memory
from hf_camphive.network.footprint import count_macs
from hf_camphive.training.data.calibration import Calibration

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "cost.json"
FEWER = {"cifar_resnet56": 2.1, "mobilenetv2_100": 1.2, "resnet18_10_classes": 1.5}
STEPS = ("trace", "score", "plan", "merge", "cut", "polish")


def main() -> None:
    """Prune what is asked for, one network after another, keeping each result as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets and weights")
    parser.add_argument("--network", nargs="+", choices=FEWER, default=list(FEWER), help="only these networks")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads to use")
    options = parser.parse_args()
    for name in options.network:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            row = process.submit(cost, name, options.data, options.threads).result()
        rows = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}) | {name: row}
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(rows))
    print(table(rows))


def cost(name: str, data: Path, threads: int) -> dict:
    """Seconds of each step of the default, and peak memory in bytes up to the cut and with the polish after it."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    base = base_of(NETWORKS[name], data)
    calibration = Calibration.collect(loaders_of(name, data, 0).calibration)
    pruner = CampHiVePruner(base, CampHiVeConfig(target_macs=1 / FEWER[name], num_train_epochs=0))
    pruner.apply(pruner.plan(calibration), calibration)
    to_cut = resident_bytes("VmHWM")
    pruner.polish(calibration)
    return {
        "calibration_images": calibration.total,
        "fewer_macs": count_macs(base.net, pruner.input_size) / count_macs(pruner.net, pruner.input_size),
        "seconds": {step: round(pruner.log.seconds[step], 1) for step in STEPS},
        "peak_bytes": {"to the cut": to_cut, "with the polish": resident_bytes("VmHWM")},
        "notes": pruner.log.notes,
        "environment": environment(),
    }


def table(rows: dict[str, dict]) -> str:
    """Rows as Markdown."""
    lines = [
        f"| network | calibration images | fewer MACs | {' | '.join(STEPS)} | before polishing | peak memory to the cut | with the polish |",
        "|---" * (6 + len(STEPS)) + "|",
    ]
    for name, row in rows.items():
        seconds = [row["seconds"][step] for step in STEPS]
        cells = [name, str(row["calibration_images"]), f"{row['fewer_macs']:.2f}x"]
        cells += [f"{value:.1f} s" for value in (*seconds, sum(seconds[:-1]))]
        cells += [f"{value / 1e9:.2f} GB" for value in row["peak_bytes"].values()]
        lines.append(f"| {' | '.join(cells)} |")
    places = dict.fromkeys(", ".join(f"{k} {v}" for k, v in row["environment"].items()) for row in rows.values())
    notes = [f"- {name}: {note}" for name, row in rows.items() for note in row["notes"]]
    lines += ["", "Memory is that of the whole process, Python and torch included.", "", *notes, "", *places]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
