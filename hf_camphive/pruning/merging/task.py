"""What a merge rule is given: weights, a plan, calibration images, and the processes that share them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import ALONE, Workers
from hf_camphive.network.graph.tracing import Trace


@dataclass(frozen=True, eq=False)
class MergeTask:
    """The full-width weights `state` of a traced network, and the plan whose removed channels are to be merged.

    `images` are calibration images [N, C, H, W], batch by batch: this process's share; `workers` sum over processes.
    `ridge` damps least-squares fits, relative to the mean squared input; `seed` draws the rows that a fit looks at.
    """

    state: Mapping[str, Tensor]
    plan: PrunePlan
    trace: Trace
    images: Sequence[Tensor] = ()
    ridge: float = 1e-4
    seed: int = 0
    workers: Workers = ALONE
