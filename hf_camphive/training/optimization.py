"""What training descends, and by which steps: the loss, the course of the learning rate, the optimizer."""

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
    """(1 - a) CE(logits, labels) + a T^2 KL(teacher || net), means over the batch; plain CE without a teacher.

    Logits [B, classes], labels [B]; a = `config.distillation`, T = `config.temperature`. In fp32 at least.
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
    """Share of the peak learning rate at optimizer step 0 .. total - 1: `warmup` rising ones, then a half cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup))))


def make_optimizer(
    kind: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW, or SGD with Nesterov momentum 0.9; norms, biases and other vectors do not decay."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=learning_rate)
    return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, nesterov=True)


def keep_zeros(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Whatever is zero now in parameters of two or more axes is +0.0 after every step, momentum and decay or not."""
    zeros: Mapping[nn.Parameter, Tensor] = {p: p.detach() == 0 for p in parameters if p.ndim > 1}

    @torch.no_grad()
    def refill(*_: object) -> None:
        for parameter, zero in zeros.items():
            parameter.masked_fill_(zero, 0)

    optimizer.register_step_post_hook(refill)
