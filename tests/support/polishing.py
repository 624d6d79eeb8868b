"""Calibration images, and a network that lost something, for tests of polishing."""

import copy

import torch
from torch import nn

from hf_camphive.training.data.calibration import Calibration
from support.toys import ToyResNet, images, randomise

BATCH = 6


def calibration(process: int = 0, processes: int = 1, x: torch.Tensor | None = None) -> Calibration:
    """Images in batches of six; batch i belongs to process i mod P."""
    x = images(54)[:24] if x is None else x
    parts = [
        values.split(BATCH)[process::processes] for values in (x, torch.full((len(x),), -1), torch.arange(len(x)))
    ]
    return Calibration(*parts, len(x))


def held_out(process: int = 0, processes: int = 1) -> Calibration:
    """Other images."""
    return calibration(process, processes, images(54)[24:])


def dense_and_damaged() -> tuple[nn.Module, nn.Module]:
    """A network and one that lost most of what its first block does."""
    dense = randomise(ToyResNet())
    damaged = copy.deepcopy(dense)
    damaged.block1.conv2.weight.data[:, 2:] = 0
    return dense, damaged
