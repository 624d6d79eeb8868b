"""Trials: plan, merge and cut a copy of the network on some calibration images, and measure its error on held-out ones."""

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
    """Hold what the trials of one cycle share: the network to cut, the dense network, the merge, and calibration images."""

    net: nn.Module
    dense: nn.Module
    task: MergeTask
    calibration: Calibration

    @property
    def is_possible(self) -> bool:
        """Return True if at least `MIN_HOLDOUT` images can be held out."""
        return self.calibration.total >= HOLDOUT_STRIDE * MIN_HOLDOUT

    def early_weight(self, plan_for: Callable[[float], PrunePlan]) -> tuple[float, int]:
        """Return the weight of early scores whose trial merge is nearest to the dense network, and the held-out images.

        `plan_for(weight)` makes the plan of a weight (`best_early_weight` says which are tried). The loss of a trial is
        the mean distance ||f(x) - f_dense(x)|| of logits over held-out images; a divergence would be dominated by a few
        of them. The second value is the number of held-out images.
        """
        fitted, held_out = self.calibration.split(HOLDOUT_STRIDE)
        some = fitted.split(TRIAL_STRIDE)[1]
        with torch.no_grad():
            targets = [self.dense(images) for images in held_out.images]

        @torch.no_grad()
        def loss(weight: float) -> float:
            task = replace(self.task, plan=plan_for(weight), images=some.images)
            net = apply_plan(self.net, task.plan, task.trace, merge(task))
            mean = float(task.workers.sum(distance(net, held_out.images, targets))) / held_out.total
            logger.info("Trial with early weight %g: logits are %.4g from the dense network's", weight, mean)
            return mean

        return best_early_weight(loss), held_out.total


def distance(net: nn.Module, batches: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Return the sum over images of ||net(image) - target||, [1] in float64, for batches of images and of logits."""
    total = torch.zeros(1, dtype=torch.float64)
    for images, target in zip(batches, targets):
        total += torch.linalg.vector_norm(to_float64(net(images) - target), dim=1).sum().cpu()
    return total
