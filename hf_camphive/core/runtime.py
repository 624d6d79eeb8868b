"""How the program was launched: this process's `Accelerator`, and what only the main process shows."""

import logging
import os

import torch
from accelerate import Accelerator
from tqdm import tqdm

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError

logger = logging.getLogger(__name__)


def make_accelerator(config: CampHiVeConfig) -> Accelerator:
    """The process's `Accelerator`; raises `ConfigError` for a launch that would silently do something else."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("1", "true"):
            raise ConfigError(
                f"accelerate launched with {name}: it shards parameters, and curvature needs second derivatives of "
                "whole ones; the networks fit on one device, so launch with --multi_gpu instead"
            )
    has_gpu = torch.accelerator.is_available()
    if config.mixed_precision == "fp16" and not has_gpu:
        raise ConfigError("mixed_precision is 'fp16', which needs a GPU; use auto, bf16 or no")
    try:
        accelerator = Accelerator(
            cpu=not has_gpu,
            mixed_precision="fp16" if config.mixed_precision == "fp16" else "no",
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
    except ValueError as error:
        raise ConfigError(f"accelerate cannot start as it was launched: {error}") from error
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != asked:
        raise ConfigError(
            f"launched as one of {asked} processes, but they do not see each other ({accelerator.num_processes} in "
            "the group): every one would do the whole run; set ACCELERATE_USE_CPU=true on CPU, or launch one process"
        )
    if "MASTER_PORT" in os.environ and "LOCAL_RANK" not in os.environ:
        logger.warning(
            "Several processes were asked for, but accelerate started one: it ignores --num_processes on CPU. "
            "To have them, launch with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N."
        )
    return accelerator


def progress_bar(accelerator: Accelerator, description: str, total: int | None, unit: str) -> tqdm:
    """A progress bar on the main process, and on no other."""
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
