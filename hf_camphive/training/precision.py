"""Precision of forward passes, and the memory format of images."""

from collections.abc import Mapping
from typing import Literal

import torch

Batch = Mapping[str, torch.Tensor]
Precision = Literal["no", "bf16", "fp16"]
AskedPrecision = Literal["auto", "no", "bf16", "fp16"]


def choose_precision(asked: AskedPrecision, device: torch.device) -> Precision:
    """Return the precision that finetuning on a device runs in.

    "auto" is bf16 on a CUDA GPU that has it natively, and fp32 elsewhere. Nothing is timed: the same command trains in
    the same precision each time.
    """
    if asked != "auto":
        return asked
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "no"


def polish_precision(asked: AskedPrecision) -> Precision:
    """Return the precision that polishing runs in, on any device: fp32, or bf16 where that is asked for.

    Its steps are few and its goal is a small error. fp16 would need a gradient scaler.
    """
    return "bf16" if asked == "bf16" else "no"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a precision: "fp16", "bf16", or disabled for "no"."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "no")


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor in fp32, or in its own type where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Return images [N, C, H, W] in channels-last memory format, in which convolutions are fast."""
    return images.contiguous(memory_format=torch.channels_last)
