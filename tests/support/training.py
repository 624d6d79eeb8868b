"""Small networks and datasets to train, and a training run that dies after a given epoch."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.runtime import make_accelerator
from hf_camphive.training.checkpoints import CheckpointStore
from hf_camphive.training.finetuning import finetune

CLASSES, SIZE = 7, 6
CONFIG = CampHiVeConfig(mixed_precision="no", learning_rate=0.05, num_train_epochs=2.0, distillation=0.0)


class Images(Dataset):
    """Noisy class patterns; `jitter` draws from the global generators, as augmentations do."""

    def __init__(self, rows: int, jitter: bool = False, seed: int = 0):
        patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(99))
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(CLASSES, (rows,), generator=generator)
        self.images = patterns[self.labels] + 0.5 * torch.randn(rows, 3, SIZE, SIZE, generator=generator)
        self.jitter = jitter

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = self.images[i]
        if self.jitter:
            image = image + 0.1 * torch.randn(()) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return {"pixel_values": image, "labels": int(self.labels[i])}


class Net(nn.Module):
    def __init__(self, norm: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            self.conv = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
            self.fc = nn.Linear(8 * 9, CLASSES)
        self.to(dtype)

    def get_classifier(self):
        return self.fc

    def forward(self, x):
        return self.fc(F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2).flatten(1))


@dataclass(frozen=True)
class Loaders:
    train: DataLoader
    validation: DataLoader | None


def loaders(rows=50, batch=8, jitter=False, validation=20):
    return Loaders(
        DataLoader(Images(rows, jitter), batch_size=batch, shuffle=True, generator=torch.Generator().manual_seed(7)),
        DataLoader(Images(validation, seed=2), batch_size=8) if validation else None,
    )


def fresh_accelerator(config=CONFIG):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return make_accelerator(config)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def accuracy_by_hand(net, dataset):
    with torch.no_grad():
        order = net.eval()(dataset.images).argsort(dim=1, descending=True)
    hit = order == dataset.labels[:, None]
    return hit[:, 0].double().mean().item(), hit[:, :5].any(1).double().mean().item()


class Stop(Exception):
    pass


def interrupted(net, config, accelerator, folder, after, monkeypatch, given=None):
    """Finetune, and die right after the checkpoint of epoch `after`."""
    save = CheckpointStore.save

    def save_then_stop(store, progress):
        save(store, progress)
        if len(progress.epochs) == after:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(CheckpointStore, "save", save_then_stop)
        finetune(net, given or loaders(jitter=True), config, accelerator, Net(), folder)
