"""The networks of the data folder that benchmarks use, with their images."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from datasets import ClassLabel, load_dataset

from hf_camphive import CampHiVeConfig, load_base, load_loaders
from hf_camphive.hub.loading import BaseModel
from hf_camphive.training.data.loaders import Loaders


@dataclass(frozen=True)
class Network:
    """A network of the data folder, with the images and budgets that it is compared at."""

    architecture: str
    weights: str
    dataset: str
    calibration_size: int
    ratios: tuple[float, ...]
    ablated_at: float | None = None


NETWORKS = {
    "cifar_resnet56": Network("cifar_resnet56", "cifar10_resnet56", "cifar10", 1024, (1.5, 2.1, 2.6, 4.2), 2.1),
    "mobilenetv2_100": Network("mobilenetv2_100", "imagenet_mobilenetv2_100", "imagenet_sample", 512, (1.2, 1.5)),
    "resnet18_10_classes": Network("resnet18", "imagenette_resnet18", "imagenette", 512, (1.2, 1.5)),
}


def base_of(network: Network, data: Path) -> BaseModel:
    """The dense network with its weights."""
    return load_base(network.architecture, str(data / "weights" / f"{network.weights}.safetensors"))


@cache
def loaders_of(name: str, data: Path, seed: int) -> Loaders:
    """Loaders of the network's dataset; the seed chooses the calibration images."""
    network = NETWORKS[name]
    config = CampHiVeConfig(calibration_size=network.calibration_size, seed=seed)
    return load_loaders(folder_of(network, data), base_of(network, data).net, config)


def folder_of(network: Network, data: Path) -> str:
    """Where the network's dataset lies."""
    folder = data / network.dataset
    return _ten_classes(folder) if network.dataset == "imagenette" else str(folder)


def _ten_classes(folder: Path) -> str:
    """Imagenette with labels 0 to 9 in place of their ImageNet indices, which is how its ResNet-18 was trained."""
    splits = load_dataset(str(folder))
    indices = sorted(set(splits["train"]["label"]))
    labels = ClassLabel(names=[str(index) for index in indices])
    target = Path(mkdtemp(prefix="imagenette10-"))
    for split, rows in splits.items():
        numbers = [indices.index(i) for i in rows["label"]]
        rows = rows.remove_columns("label").add_column("label", numbers).cast_column("label", labels)
        rows.to_parquet(str(target / f"{split}-00000-of-00001.parquet"))
    return str(target)
