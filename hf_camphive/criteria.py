"""How important each channel is: one pure function a criterion, and the table `CRITERIA`.

Scores are {group: [C]}, larger is more important; those of `fisher`, `hive` and `taylor` are in units of the loss, so
that they compare across groups. Adding a criterion is a function and a row.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .config import CampHiVeConfig
from .curvature import (
    Batch,
    Curvature,
    curvature_cotangent,
    factored_curvature,
    gate_curvature,
    gauss_newton_factor,
    label_cotangent,
)
from .gates import GateSpace, gate_gradients, gate_space
from .spectrum import State, lanczos, power_iteration
from .tracing import Trace

logger = logging.getLogger(__name__)
Scores = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]
EIGENSOLVERS = {"lanczos": lanczos, "power": power_iteration}


class Memory(Protocol):
    """Where the state of an iteration outlives an interruption."""

    def load(self) -> State | None: ...

    def save(self, state: State) -> None: ...


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: the traced network with its weights, and this process's calibration images.

    `indices` number the images over all processes, so that what is drawn at random for an image does not depend on how
    images are spread; `total` counts them, `reduce` sums a tensor over processes. An iteration keeps where it stands in
    `memory`, and goes on from there.
    """

    trace: Trace
    state: Mapping[str, Tensor]
    images: tuple[Tensor, ...]
    labels: tuple[Tensor, ...]
    indices: tuple[Tensor, ...]
    total: int
    config: CampHiVeConfig
    reduce: Reduce = lambda tensor: tensor
    progress: bool = False
    memory: Memory | None = None

    @property
    def gates(self) -> GateSpace:
        return gate_space(self.trace, self.state)

    def batches(self, description: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = list(zip(self.images, self.labels, self.indices))
        return iter(tqdm(batches, desc=description, unit="batch", disable=not self.progress, leave=False))


def fisher(evidence: Evidence) -> Scores:
    """1/2 mean_n g_nc^2, g_n = J_n^T z_n a gate gradient with E[z z^T] = diag(p) - p p^T: half the true Fisher's diagonal.

    Group Fisher (Liu et al., ICML 2021). Deviation: their gradients are those at the training labels, which vanish in an
    overfitted network; ours have the covariance of gradients at labels drawn from the network itself, with less variance
    (`curvature_cotangent`).
    """
    gates = evidence.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    classes = evidence.trace.graph.logits.meta["val"].shape[-1]
    generator = torch.Generator().manual_seed(evidence.config.seed)
    signs = torch.randint(0, 2, (evidence.total, classes), generator=generator) * 2 - 1
    for images, _, indices in evidence.batches("Score (fisher)"):
        cotangent = partial(curvature_cotangent, signs=signs[indices.cpu()].to(images.device))
        gradients = gate_gradients(evidence.trace, evidence.state, gates, images, cotangent)
        total += gradients.double().square().sum(0).cpu()
    return gates.split(0.5 * evidence.reduce(total) / evidence.total)


def taylor(evidence: Evidence) -> Scores:
    """mean_n |g_nc|, g_nc the gate gradient of image n at its true label (Molchanov et al., ICLR 2017)."""
    gates = evidence.gates
    total = torch.zeros(gates.size, dtype=torch.float64)
    for images, labels, _ in evidence.batches("Score (taylor)"):
        cotangent = partial(label_cotangent, labels=labels)
        gradients = gate_gradients(evidence.trace, evidence.state, gates, images, cotangent)
        total += gradients.double().abs().sum(0).cpu()
    return gates.split(evidence.reduce(total) / evidence.total)


def hive(evidence: Evidence) -> Scores:
    """1/2 sum_k lambda_k u_kc^2 over the top eigenpairs of the gate-space curvature matrix.

    CAMP-HiVe (arXiv:2511.06265): curvature from Hessian-vector products and power iteration. Deviation: the paper takes
    |v_i| of the dominant eigenvector in weight space; the loss of removing channel c is, to second order along the top
    eigenvectors, the quadratic form above. With all eigenpairs of the Gauss-Newton matrix it is `fisher` without its
    random signs.
    """
    config, gates, memory = evidence.config, evidence.gates, evidence.memory
    matrix = _gauss_newton(evidence) if config.curvature == "gauss-newton" else _hessian(evidence)
    found = EIGENSOLVERS[config.eigensolver](
        matrix,
        gates.size,
        config.num_eigenpairs,
        steps=config.power_steps,
        tolerance=config.power_tolerance,
        generator=torch.Generator().manual_seed(config.seed),
        start=memory and memory.load(),
        keep=memory and memory.save,
        progress=evidence.progress,
    )
    if not found.converged:
        logger.warning("hive: %s (power_steps, power_tolerance)", found.verdict)
    return gates.split(0.5 * (found.vectors.double().square() * found.values.double()).sum(1))


def _hessian(evidence: Evidence) -> Curvature:
    batches, total = _first_batches(evidence)
    options = {"total": total, "reduce": evidence.reduce, "progress": evidence.progress}
    return gate_curvature(evidence.trace, evidence.state, evidence.gates, batches, **options)


def _gauss_newton(evidence: Evidence) -> Curvature:
    """The Gauss-Newton matrix by its factor: a backward pass a class, and eigenpairs for nothing."""
    batches, total = _first_batches(evidence)
    trace, gates = evidence.trace, evidence.gates
    classes = min(evidence.config.curvature_classes, trace.graph.logits.meta["val"].shape[-1])
    rows, shares = [], torch.zeros((), dtype=torch.float64)
    for images, _ in tqdm(batches, "Score (hive)", unit="batch", disable=not evidence.progress, leave=False):
        factor, share = gauss_newton_factor(trace, evidence.state, gates, images, classes)
        rows.append(factor)
        shares += share.sum().cpu()
    logger.info(
        "hive: %d classes hold %.1f %% of the softmax's curvature", classes, 100 * evidence.reduce(shares) / total
    )
    return factored_curvature(rows, gates.size, total, reduce=evidence.reduce)


def magnitude(evidence: Evidence) -> Scores:
    """||theta_c||^2 of the consumer slices, over its mean in the group (sizes of different groups do not compare)."""
    gates = evidence.gates
    total = torch.zeros(gates.size + 1, dtype=torch.float64)
    for name, index in gates.inputs.items():
        total.index_add_(
            0, index, evidence.state[name].detach().cpu().double().square().movedim(1, 0).flatten(1).sum(1)
        )
    return {name: values / values.mean().clamp_min(1e-300) for name, values in gates.split(total[:-1]).items()}


def random(evidence: Evidence) -> Scores:
    """Uniform numbers from the seed: the floor under every comparison."""
    gates = evidence.gates
    generator = torch.Generator().manual_seed(evidence.config.seed)
    return gates.split(torch.rand(gates.size, generator=generator, dtype=torch.float64))


Criterion = Callable[[Evidence], Scores]
CRITERIA: dict[str, Criterion] = {
    "fisher": fisher,
    "hive": hive,
    "taylor": taylor,
    "magnitude": magnitude,
    "random": random,
}


def _first_batches(evidence: Evidence) -> tuple[list[Batch], int]:
    """This process's part of the first `curvature_images` calibration images, and their number over all processes."""
    share = evidence.config.curvature_images / max(evidence.total, 1)
    budget = min(sum(map(len, evidence.images)), round(share * sum(map(len, evidence.images))))
    batches = []
    for images, labels in zip(evidence.images, evidence.labels):
        if budget > 0:
            batches.append((images[:budget], labels[:budget]))
            budget -= len(batches[-1][0])
    count = torch.tensor([float(sum(len(images) for images, _ in batches))], dtype=torch.float64)
    return batches, int(evidence.reduce(count))
