"""What a criterion may look at: the network, its calibration images, and the gradients and products they give."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.curvature.eigensolvers import SolverState
from hf_camphive.curvature.gates import GateSpace, gate_gradients, gate_space
from hf_camphive.curvature.operators import Batch, curvature_cotangent, label_cotangent
from hf_camphive.network.graph.tracing import Trace

Scores = dict[str, Tensor]
Reduce = Callable[[Tensor], Tensor]


class SolverCheckpoint(Protocol):
    """Where the state of an iteration outlives an interruption."""

    def load(self) -> SolverState | None: ...

    def save(self, state: SolverState) -> None: ...


@dataclass(frozen=True)
class ScoringContext:
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
    memory: SolverCheckpoint | None = None

    @property
    def gates(self) -> GateSpace:
        return gate_space(self.trace, self.state)

    def batches(self, description: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        batches = list(zip(self.images, self.labels, self.indices))
        return iter(tqdm(batches, desc=description, unit="batch", disable=not self.progress, leave=False))

    def label_gradients(self, description: str) -> Iterator[Tensor]:
        """Gate gradients [N, S] of each image's own cross-entropy at its true label, in float64, batch by batch."""
        gates = self.gates
        for images, labels, _ in self.batches(description):
            cotangent = partial(label_cotangent, labels=labels)
            yield gate_gradients(self.trace, self.state, gates, images, cotangent).double()

    def signs(self) -> Tensor:
        """Random signs for each class of each calibration image of all processes, [N, K]."""
        classes = self.trace.graph.logits.meta["val"].shape[-1]
        generator = torch.Generator().manual_seed(self.config.seed)
        return torch.randint(0, 2, (self.total, classes), generator=generator) * 2 - 1

    def model_gradients(self, description: str) -> Iterator[Tensor]:
        """Gate gradients g_n = J_n^T z_n [N, S] in float64 with E[z z^T] = diag(p) - p p^T, batch by batch.

        mean_n g_n g_n^T is the Gauss-Newton matrix in expectation (`curvature_cotangent`).
        """
        gates, signs = self.gates, self.signs()
        for images, _, indices in self.batches(description):
            cotangent = partial(curvature_cotangent, signs=signs[indices.cpu()].to(images.device))
            yield gate_gradients(self.trace, self.state, gates, images, cotangent).double()

    def curvature_batches(self) -> tuple[list[Batch], int]:
        """This process's part of the first `curvature_images` images and labels, and their number over all processes."""
        share = self.config.curvature_images / max(self.total, 1)
        budget = min(sum(map(len, self.images)), round(share * sum(map(len, self.images))))
        batches = []
        for images, labels in zip(self.images, self.labels):
            if budget > 0:
                batches.append((images[:budget], labels[:budget]))
                budget -= len(batches[-1][0])
        count = torch.tensor([float(sum(len(images) for images, _ in batches))], dtype=torch.float64)
        return batches, int(self.reduce(count))
