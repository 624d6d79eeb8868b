"""The argument of a merge rule: weights, a plan, calibration images, and the processes that share them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import ALONE, Workers
from hf_camphive.network.graph.tracing import Trace


@dataclass(frozen=True, eq=False)
class MergeTask:
    """Hold the full-width weights `state` of a traced network, and the plan whose removed channels are to be merged.

    `images` is this process's share of the calibration images, in batches [N, C, H, W]; `workers` sums over processes.
    `ridge` damps least-squares fits, relative to the mean squared input; `seed` determines the rows that a fit samples.
    """

    state: Mapping[str, Tensor]
    plan: PrunePlan
    trace: Trace
    images: Sequence[Tensor] = ()
    ridge: float = CampHiVeConfig.ridge
    seed: int = 0
    workers: Workers = ALONE
