"""Accuracy of pruned networks before any training, on real data; prints a table and keeps it in docs/results/.

    python benchmarks/no_training.py --data FOLDER

FOLDER holds cifar10/, imagenet_sample/, imagenette/ (parquet) and weights/*.safetensors. Resumable: a row that stands in
docs/results/no_training.json is not run again. Calibration images are training images, or, where the dataset has one split
only, disjoint from those tested. Every row states its own dense accuracy, cost and seconds.
"""

import argparse
import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from datasets import ClassLabel, load_dataset

from hf_camphive import CampHiVeConfig, CampHiVePruner, load_base, load_loaders
from hf_camphive.calibration import Calibration
from hf_camphive.report import count_macs, count_parameters, environment
from hf_camphive.training import evaluate_accuracy, make_accelerator

RESULTS = Path(__file__).parent.parent / "docs" / "results"
NETWORKS = {
    "cifar_resnet56": ("cifar_resnet56", "cifar10_resnet56", "cifar10", 1024),
    "mobilenetv2_100": ("mobilenetv2_100", "imagenet_mobilenetv2_100", "imagenet_sample", 512),
    "resnet18 (10 classes)": ("resnet18", "imagenette_resnet18", "imagenette", 512),
}


@dataclass(frozen=True)
class Job:
    """One row of the table."""

    network: str
    fewer: float
    criterion: str = "fisher"
    merge: str = "reconstruct"
    seed: int = 0

    @property
    def key(self) -> str:
        """Name of the row in the results."""
        return f"{self.network} {self.fewer}x {self.criterion} {self.merge} seed {self.seed}"


JOBS = [
    Job("cifar_resnet56", 2.1),
    Job("mobilenetv2_100", 1.2),
    Job("mobilenetv2_100", 1.5),
    Job("resnet18 (10 classes)", 1.2),
    Job("resnet18 (10 classes)", 1.5),
    *(Job("cifar_resnet56", 2.1, merge=merge) for merge in ("none", "cyclic")),
    *(Job("cifar_resnet56", 2.1, criterion) for criterion in ("magnitude", "hive")),
    *(Job("cifar_resnet56", fewer) for fewer in (1.5, 4.2, 2.6)),
    *(Job("cifar_resnet56", 2.1, criterion) for criterion in ("taylor", "random")),
    *(Job("cifar_resnet56", 2.1, merge=merge) for merge in ("lstsq", "nearest", "cyclic-ls")),
    *(Job("cifar_resnet56", 2.1, seed=seed) for seed in (1, 2)),
    *(Job("mobilenetv2_100", fewer, merge="none") for fewer in (1.2, 1.5)),
]


def main() -> None:
    """Run the rows that are not there yet, keeping each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the datasets and weights")
    data = parser.parse_args().data
    logging.getLogger("hf_camphive").setLevel(logging.WARNING)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "no_training.json"
    rows = json.loads(path.read_text()) if path.exists() else {}
    for job in JOBS:
        if job.key not in rows:
            rows[job.key] = run(job, data)
            path.write_text(json.dumps(rows, indent=1) + "\n")
            (RESULTS / "no_training.md").write_text(table(rows))
            print(table({job.key: rows[job.key]}).splitlines()[-1], flush=True)
    print(table(rows))


def run(job: Job, data: Path) -> dict:
    """Prune once and measure; without training, so the whole test set is fair game exactly once."""
    base, dense = dense_accuracy(job.network, data)
    config = CampHiVeConfig(
        target_macs=1 / job.fewer,
        criterion=job.criterion,
        merge=job.merge,
        seed=job.seed,
        calibration_size=NETWORKS[job.network][3],
        num_train_epochs=0,
        curvature_images=128,  # of `hive`, whose products take minutes on a CPU
        power_steps=8,
    )
    loaders = loaders_of(job.network, data, job.seed)
    pruner = CampHiVePruner(base, config)
    calibration = Calibration.collect(loaders.calibration, pruner.accelerator.device)
    plan = pruner.plan(calibration)
    net = pruner.apply(plan, calibration)
    loader, split = loaders.evaluation
    found = evaluate_accuracy(net, loader, pruner.accelerator, split)
    return {
        "network": job.network,
        "fewer": base_macs(job.network, data) / count_macs(net, pruner.input_size),
        "criterion": job.criterion,
        "merge": job.merge,
        "seed": job.seed,
        "dense_top1": dense.top1,
        "top1": found.top1,
        "images": found.images,
        "split": split,
        "calibration": loaders.info.splits["calibration"],
        "macs": count_macs(net, pruner.input_size),
        "parameters": count_parameters(net),
        "dropped": len(plan.dropped),
        "seconds": {step: round(seconds, 1) for step, seconds in pruner.seconds.items()},
        "environment": environment(),
    }


@cache
def dense_accuracy(network: str, data: Path):
    """(base model, its accuracy), evaluated once."""
    architecture, weights, _, _ = NETWORKS[network]
    base = load_base(architecture, str(data / "weights" / f"{weights}.safetensors"))
    loader, split = loaders_of(network, data, 0).evaluation
    return base, evaluate_accuracy(base.net, loader, make_accelerator(CampHiVeConfig()), split)


@cache
def base_macs(network: str, data: Path) -> int:
    """MACs per image of the dense network."""
    base, _ = dense_accuracy(network, data)
    return count_macs(base.net, base.net.pretrained_cfg["input_size"])


@cache
def loaders_of(network: str, data: Path, seed: int):
    """Loaders of the network's dataset; the seed chooses the calibration images."""
    architecture, weights, dataset, calibration = NETWORKS[network]
    base = load_base(architecture, str(data / "weights" / f"{weights}.safetensors"))
    folder = ten_classes(data / dataset) if dataset == "imagenette" else str(data / dataset)
    return load_loaders(folder, base.net, CampHiVeConfig(calibration_size=calibration, seed=seed))


def ten_classes(folder: Path) -> str:
    """Imagenette with labels 0 to 9 in place of their ImageNet indices, which is how its ResNet-18 was trained."""
    splits = load_dataset(str(folder))
    indices = sorted(set(splits["train"]["label"]))
    labels = ClassLabel(names=[str(index) for index in indices])
    renumbered = {
        split: rows.remove_columns("label")
        .add_column("label", [indices.index(i) for i in rows["label"]])
        .cast_column("label", labels)
        for split, rows in splits.items()
    }
    target = Path(mkdtemp(prefix="imagenette10-"))
    for split, rows in renumbered.items():
        rows.to_parquet(str(target / f"{split}-00000-of-00001.parquet"))
    return str(target)


def table(rows: dict[str, dict]) -> str:
    """Rows as Markdown."""
    lines = [
        "| network | fewer MACs | criterion | merge | seed | dense | top-1 | images | parameters | dropped | score + merge |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        seconds = sum(row["seconds"].get(step, 0) for step in ("score", "plan", "merge", "cut", "recalibrate"))
        lines.append(
            f"| {row['network']} | {row['fewer']:.2f}x | `{row['criterion']}` | `{row['merge']}` | {row['seed']} "
            f"| {100 * row['dense_top1']:.2f} | {100 * row['top1']:.2f} | {row['images']:,} | {row['parameters']:,} "
            f"| {row['dropped']} | {seconds:.0f} s |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
