"""Trials: plan, merge and cut a copy of the network on some of the calibration images, judged by images held out of it."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hf_camphive.core.plan import PrunePlan
from hf_camphive.core.runtime import to_float64
from hf_camphive.network.surgery.cutting import apply_plan
from hf_camphive.pruning.merging.rules import merge
from hf_camphive.pruning.merging.task import MergeTask
from hf_camphive.pruning.scoring.depth_weighting import best_early_weight
from hf_camphive.pruning.tuning import HOLDOUT_STRIDE, MIN_HOLDOUT, TRIAL_STRIDE
from hf_camphive.training.data.calibration import Calibration

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Trial:
    """What the trials of one cycle share: the network to cut, the dense network, the merge, and the calibration images."""

    net: nn.Module
    dense: nn.Module
    task: MergeTask
    calibration: Calibration

    @property
    def is_possible(self) -> bool:
        """Whether enough images can be held out to judge by."""
        return self.calibration.total >= HOLDOUT_STRIDE * MIN_HOLDOUT

    def early_weight(self, plan_for: Callable[[float], PrunePlan]) -> tuple[float, int]:
        """Return the weight of early scores whose trial merge is nearest to the dense network, and how many images judged.

        `plan_for(weight)` makes the plan of a weight. A trial is judged by the mean distance ||f(x) - f_dense(x)|| of
        logits: of a divergence, a few images would make up most.
        """
        fitted, judges = self.calibration.split(HOLDOUT_STRIDE)
        some = fitted.split(TRIAL_STRIDE)[1]
        with torch.no_grad():
            targets = [self.dense(images) for images in judges.images]

        @torch.no_grad()
        def loss(weight: float) -> float:
            task = replace(self.task, plan=plan_for(weight), images=some.images)
            net = apply_plan(self.net, task.plan, task.trace, merge(task))
            mean = float(task.workers.sum(distance(net, judges.images, targets))) / judges.total
            logger.info("Trial with early weight %g: logits are %.4g from the dense network's", weight, mean)
            return mean

        return best_early_weight(loss), judges.total


def distance(net: nn.Module, batches: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the sum over images of ||net(image) - target||, [1] in float64, for batches of images and of logits."""
    total = torch.zeros(1, dtype=torch.float64)
    for images, target in zip(batches, targets):
        total += torch.linalg.vector_norm(to_float64(net(images) - target), dim=1).sum().cpu()
    return total
