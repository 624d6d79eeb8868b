"""The training loss, the learning-rate schedule and the optimizers."""

import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.training.precision import at_least_fp32


def classification_loss(
    logits: torch.Tensor, labels: torch.Tensor, teacher_logits: torch.Tensor | None, config: CampHiVeConfig
) -> torch.Tensor:
    """Compute the loss (1 - a) CE(logits, labels) + a T^2 KL(teacher || network), averaged over the batch.

    This is distillation as in Hinton et al. (arXiv:1503.02531): a is `config.distillation`, and T, `config.temperature`,
    divides both logits within KL. Without a teacher the loss is the cross-entropy CE alone. Logits are [B, classes],
    labels [B]. Computed in fp32, or in the type of the logits where that is wider.
    """
    logits = at_least_fp32(logits)
    hard = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if teacher_logits is None:
        return hard
    t = config.temperature
    given = F.log_softmax(at_least_fp32(teacher_logits) / t, dim=1)
    soft = F.kl_div(F.log_softmax(logits / t, dim=1), given, log_target=True, reduction="batchmean")
    return (1 - config.distillation) * hard + config.distillation * t**2 * soft


def warmup_cosine(step: float, warmup: int, total: int) -> float:
    """Return the learning rate at an optimizer step, 0 .. total - 1, as a share of its peak.

    The share rises linearly over the first `warmup` steps, (step + 1) / (warmup + 1), then falls along half a cosine,
    (1 + cos(pi t)) / 2 with t = (step - warmup) / (total - warmup).
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def make_optimizer(
    kind: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return AdamW for `kind` "adamw", else SGD with Nesterov momentum 0.9.

    Weight decay applies to parameters with two or more axes only, not to biases and the scales of norms.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def keep_zeros(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Have an optimizer reset to +0.0, after each step, the entries that are zero now in parameters of two or more axes.

    Momentum and weight decay therefore cannot move pruned weights away from zero.
    """
    zeros: Mapping[nn.Parameter, Tensor] = {p: p.detach() == 0 for p in parameters if p.ndim > 1}

    @torch.no_grad()
    def refill(*_: object) -> None:
        for parameter, zero in zeros.items():
            parameter.masked_fill_(zero, 0)

    optimizer.register_step_post_hook(refill)
