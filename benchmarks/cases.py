"""Networks with images for them, as benchmarks of curvature use them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, loaders_of
from torch import Tensor, nn

from hf_camphive import load_base
from hf_camphive.curvature.gates import GatedNetwork
from hf_camphive.curvature.operators import Curvature, gate_curvature, network_curvature
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import Trace, trace_network

SEED = 0
WEIGHTS = {"cifar_resnet20": "cifar10_resnet20", "cifar_resnet32": "cifar10_resnet32"}  # beside those of NETWORKS


@dataclass(frozen=True, eq=False)
class Case:
    """A network in eval mode, and images and labels for it."""

    network: str
    net: nn.Module
    images: Tensor
    labels: Tensor
    source: str

    @property
    def subject(self) -> str:
        """Network and batch, for a row of a table."""
        return f"{self.network}, {len(self.images)} images at {self.images.shape[-1]}"

    def first(self, count: int | None) -> "Case":
        """The same with the first images only."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    @property
    def trace(self) -> Trace:
        """Its channels."""
        return _traced(self.net, tuple(self.images.shape[1:]))

    @property
    def state(self) -> dict[str, Tensor]:
        """Its weights and buffers, apart from autograd."""
        return {name: tensor.detach() for name, tensor in named_tensors(self.net).items()}

    def gate_curvature(self, matrix: str = "hessian", dtype: torch.dtype = torch.float32) -> Curvature:
        """lift^T H lift or lift^T J^T R J lift, the images in one batch."""
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in self.state.items()
        }
        batches = [(self.images.to(dtype), self.labels)]
        return gate_curvature(GatedNetwork(self.trace, state), batches, matrix)

    def weight_curvature(self, matrix: str = "hessian") -> Curvature:
        """H or J^T R J over all weights, the images in one batch."""
        return network_curvature(self.net, [(self.images, self.labels)], matrix)[0]

    def gradient(self) -> tuple[Tensor, ...]:
        """The ordinary gradient in all weights, of the module as it is."""
        return torch.autograd.grad(F.cross_entropy(self.net(self.images), self.labels), list(self.net.parameters()))

    def direction(self, curvature: Curvature, vectors: int | None = None) -> Tensor:
        """Random vectors for a matrix, [n] or [n, k]."""
        shape = (curvature.size,) if vectors is None else (curvature.size, vectors)
        return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(self.images)


@cache
def _traced(net: nn.Module, input_size: tuple[int, int, int]) -> Trace:
    return trace_network(net, input_size)


def load_case(network: str, count: int, data: Path | None, device: str) -> Case:
    """A network with `count` images, both real where the data folder has them and random otherwise, which `source` says."""
    torch.manual_seed(SEED)
    net, weights = _network(network, data)
    images, labels, source = _images(network, count, data, net)
    net = net.eval().to(device, memory_format=torch.channels_last)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    return Case(network, net, images, labels.to(device), f"{weights} weights, {source}")


def _network(name: str, data: Path | None) -> tuple[nn.Module, str]:
    stem = WEIGHTS.get(name) or (NETWORKS[_kept(name)].weights if _kept(name) else None)
    file = data and stem and data / "weights" / f"{stem}.safetensors"
    if file and file.exists():
        return load_base(name, str(file)).net, "trained"
    return timm.create_model(name), "random"


def _images(name: str, count: int, data: Path | None, net: nn.Module) -> tuple[Tensor, Tensor, str]:
    key = _kept("cifar_resnet56" if name.startswith("cifar_") else name)
    if data and key and (data / NETWORKS[key].dataset).is_dir():
        images, labels = (torch.cat(parts)[:count] for parts in zip(*_batches(key, data, count)))
        if len(images) < count:
            raise SystemExit(
                f"{data / NETWORKS[key].dataset} has {len(images)} calibration images; {count} were asked for"
            )
        return images, labels, f"real images ({NETWORKS[key].dataset})"
    return (
        torch.randn(count, *net.pretrained_cfg["input_size"]),
        torch.randint(net.num_classes, (count,)),
        "random images",
    )


def _batches(key: str, data: Path, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in loaders_of(key, data, SEED).calibration:
        yield batch["pixel_values"], batch["labels"]
        count -= len(batch["labels"])
        if count <= 0:
            return


def _kept(network: str) -> str | None:
    """The name under which the data folder has a trained network of this architecture."""
    return next((key for key, kept in NETWORKS.items() if kept.architecture == network), None)
