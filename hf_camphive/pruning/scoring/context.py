"""The argument of a criterion: the network, its calibration images, and gradients computed from both."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.runtime import ALONE, Workers, to_float64
from hf_camphive.curvature.cotangents import curvature_cotangent, label_cotangent
from hf_camphive.curvature.eigensolvers import SolverCheckpoint
from hf_camphive.curvature.gates import GatedNetwork, GateSpace
from hf_camphive.curvature.operators import Batch
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.network.graph.tracing import Trace
from hf_camphive.training.data.calibration import Calibration

Scores = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class ScoringContext:
    """Hold what criteria compute from: the analysed network, this process's calibration images, and the run's settings.

    `workers` sums over processes. Iterative solvers save their state in `checkpoint` and resume from it.
    """

    analysis: NetworkAnalysis
    calibration: Calibration
    config: CampHiVeConfig
    workers: Workers = ALONE
    checkpoint: SolverCheckpoint | None = None

    @property
    def trace(self) -> Trace:
        """Return the traced network: its operations and channel groups."""
        return self.analysis.trace

    @cached_property
    def network(self) -> GatedNetwork:
        """Return the network as a function of its channel gates, built once."""
        return GatedNetwork(self.trace, self.analysis.state)

    @property
    def gates(self) -> GateSpace:
        """Return the layout of the gates: which of the S gates belongs to which channel."""
        return self.network.gates

    @property
    def total(self) -> int:
        """Return the number of calibration images over all processes."""
        return self.calibration.total

    def weight(self, name: str) -> Tensor:
        """Return a weight of the network, in float64 on the CPU."""
        return self.analysis.state[name].detach().cpu().double()

    def batches(self, description: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield this process's batches, with a progress bar: images [N, C, H, W], labels [N], indices [N].

        Indices count the images of all processes together.
        """
        calibration = self.calibration
        batches = list(zip(calibration.images, calibration.labels, calibration.indices))
        return self.workers.track(batches, description, "batch")

    def label_gradients(self, description: str) -> Iterator[Tensor]:
        """Yield, batch by batch, the gate gradients [N, S] of each image's cross-entropy at its true label, in float64."""
        for images, labels, _ in self.batches(description):
            yield to_float64(self.network.gradients(images, partial(label_cotangent, labels=labels)))

    def signs(self) -> Tensor:
        """Draw a random sign for each class of each calibration image of all processes, [N, K], from the config's seed.

        Row n belongs to the image of index n, so that signs do not depend on how images are distributed over processes.
        """
        classes = self.trace.graph.logits.meta["val"].shape[-1]
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randint(0, 2, (self.total, classes), generator=generator) * 2 - 1

    def model_gradients(self, description: str) -> Iterator[Tensor]:
        """Yield, batch by batch, label-free gate gradients g_n = J_n^T z_n [N, S] in float64.

        J_n is the Jacobian of image n's logits in the gates and z_n a random vector with E[z z^T] = diag(p) - p p^T
        (`curvature_cotangent`), so that mean_n g_n g_n^T is the Gauss-Newton matrix in expectation.
        """
        signs = self.signs()
        for images, _, indices in self.batches(description):
            cotangent = partial(curvature_cotangent, signs=signs[indices.cpu()].to(images.device))
            yield to_float64(self.network.gradients(images, cotangent))

    def curvature_batches(self) -> tuple[list[Batch], int]:
        """Return this process's share of `curvature_images` images with their labels, and their number over all processes."""
        calibration = self.calibration
        held = sum(map(len, calibration.images))
        left = min(held, round(self.config.curvature_images / max(self.total, 1) * held))
        batches = []
        for images, labels in zip(calibration.images, calibration.labels):
            if left > 0:
                batches.append((images[:left], labels[:left]))
                left -= len(batches[-1][0])
        count = torch.tensor([float(sum(len(images) for images, _ in batches))], dtype=torch.float64)
        return batches, int(self.workers.sum(count))
