"""Which precision a forward pass runs in: autocast of ours, and a probe that times bf16 against fp32 where it is left open."""

import copy
import logging
import time
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.measures import format_ms
from hf_camphive.network.footprint import wait_for

logger = logging.getLogger(__name__)
Batch = Mapping[str, torch.Tensor]
Precision = Literal["no", "bf16", "fp16"]
PROBE_STEPS = 3
PROBE_FEW_ROWS = 16
PROBE_LONG_STEP = 0.5  # seconds; beyond it the probe makes do with few rows
MAX_SHARE_OF_FP32 = 0.9  # bf16 must take less than this share of fp32's time: of two equals fp32 is the more exact


def choose_precision(net: nn.Module, batch: Batch, device: torch.device) -> tuple[Precision, dict[Precision, float]]:
    """Time training steps of a copy in fp32 and under bf16 autocast; return the faster and the seconds per step.

    bf16 is worth it on some processors and ten times slower on others, and no flag of theirs tells. Devices that
    cannot do bf16 are not timed. Where a step is long, 16 images stand for the batch.
    """
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return "no", {}
    probe = copy.deepcopy(net).to(device, memory_format=torch.channels_last).train()
    batch = {key: value.to(device) for key, value in batch.items()}
    few = {key: value[:PROBE_FEW_ROWS] for key, value in batch.items()}
    if _step_seconds(probe, few, "no") > PROBE_LONG_STEP:
        batch = few
    precisions: tuple[Precision, ...] = ("no", "bf16")
    best = {precision: _step_seconds(probe, batch, precision) for precision in precisions}
    if best["bf16"] < 4 * best["no"]:
        rounds = [[_step_seconds(probe, batch, precision) for precision in precisions] for _ in range(PROBE_STEPS)]
        best = {precision: min(times) for precision, times in zip(precisions, zip(*rounds))}
    choice: Precision = "bf16" if best["bf16"] < MAX_SHARE_OF_FP32 * best["no"] else "no"
    logger.info(
        "A training step of %d images takes %s in fp32, %s in bf16; using %s",
        len(batch["labels"]),
        *(format_ms(1000 * best[precision]) for precision in precisions),
        "fp32" if choice == "no" else choice,
    )
    return choice, best


def shared_choice(net: nn.Module, batch: Batch, config: CampHiVeConfig, accelerator: Accelerator) -> Precision:
    """The main process's choice, for all; on calibration images, since drawing others would change their order."""
    rows = config.per_device_train_batch_size
    choice = [choose_precision(net, {key: value[:rows] for key, value in batch.items()}, accelerator.device)[0]]
    return broadcast_object_list(choice)[0]


def polish_precision(net: nn.Module, batch: Batch, config: CampHiVeConfig, accelerator: Accelerator) -> Precision:
    """What `config.mixed_precision` asks for, but fp32 in place of fp16: that one needs a gradient scaler."""
    if config.mixed_precision == "auto":
        few = {key: value[:PROBE_FEW_ROWS] for key, value in batch.items()}
        return shared_choice(net, few, config, accelerator)
    return "bf16" if config.mixed_precision == "bf16" else "no"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The forward pass of a precision; nothing in fp32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "no")


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Values in fp32, or in their own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Images [N, C, H, W] in the memory format that convolutions are fast in."""
    return images.contiguous(memory_format=torch.channels_last)


def _step_seconds(net: nn.Module, batch: Batch, precision: Precision) -> float:
    device = batch["pixel_values"].device
    wait_for(device)
    began = time.perf_counter()
    with autocast(device, precision):
        loss = F.cross_entropy(at_least_fp32(net(channels_last(batch["pixel_values"]))), batch["labels"])
    loss.backward()
    net.zero_grad()
    wait_for(device)
    return time.perf_counter() - began
