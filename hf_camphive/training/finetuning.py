"""Training with Accelerate: finetune a network, or train a new classifier only.

Networks are passed unwrapped and stay unwrapped. Results are the same on one process and on several, up to the rounding of
sums.

Mixed precision is an autocast context around the forward pass, instead of Accelerate's wrapper around the network, so that
it can be chosen per network and nothing of it stays on the network. The gradient scaler that fp16 needs is Accelerate's.
"""

import base64
import hashlib
import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import DataError, TrainingError
from hf_camphive.core.measures import format_precision
from hf_camphive.core.runtime import Workers
from hf_camphive.network.modes import keeping_modes
from hf_camphive.network.timm_interface import timm_interface
from hf_camphive.training.checkpoints import CheckpointStore, EpochLog, TrainingProgress
from hf_camphive.training.evaluation import evaluate_accuracy
from hf_camphive.training.optimization import classification_loss, keep_zeros, make_optimizer, warmup_cosine
from hf_camphive.training.precision import AskedPrecision, Batch, autocast, channels_last, choose_precision

logger = logging.getLogger(__name__)

HEAD_LEARNING_RATE = 1e-3


class TrainingLoaders(Protocol):
    """The members of `data.loaders.Loaders` that training reads."""

    @property
    def train(self) -> DataLoader | None:
        """Batches of training images."""

    @property
    def validation(self) -> DataLoader | None:
        """Batches of validation images; without them no accuracy is measured during training."""


@dataclass(frozen=True)
class FinetuneLog:
    """Record of a training run: its epochs, the precision of its forward passes, and the number of optimizer steps."""

    epochs: tuple[EpochLog, ...]
    mixed_precision: str
    steps: int

    def to_dict(self) -> dict[str, Any]:
        """Return the log as JSON values."""
        return asdict(self) | {"epochs": [asdict(epoch) for epoch in self.epochs]}


def finetune(
    net: nn.Module,
    loaders: TrainingLoaders,
    config: CampHiVeConfig,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    checkpoint_dir: Path | str | None = None,
    resume: bool = False,
) -> FinetuneLog:
    """Train a network in place for `config.num_train_epochs` epochs, and keep the weights of the last epoch.

    The loss is (1 - a) CE + a T^2 KL(teacher || network) with a = `config.distillation` (0 without a teacher) and
    T = `config.temperature` (Hinton et al., arXiv:1503.02531). Per optimizer step, the learning rate rises linearly, then
    falls along a cosine. With a `checkpoint_dir`, the state is saved there after every epoch; with `resume`, training
    continues from it and ends with the same weights as without the interruption. With granularity "weight", weights that
    are zero stay zero.

    Raises:
        DataError: There are no training images, or the training split is a stream without a length.
        TrainingError: The loss or the gradient is not finite (the weights are unchanged by that step), or the checkpoint
            is damaged.
        ConfigError: The checkpoint belongs to another run.
    """
    run = _TrainingSpec(
        net=net,
        parameters=[p for p in net.parameters() if p.requires_grad],
        epochs=config.num_train_epochs,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        precision=config.mixed_precision,
        training_mode=True,
        teacher=teacher if config.distillation else None,
        description="Finetune",
        keeps_zeros=not config.cuts_channels,
    )
    store = None if checkpoint_dir is None else CheckpointStore(Path(checkpoint_dir), accelerator)
    return _train(run, loaders, config, accelerator, store, resume)


def train_head(
    net: nn.Module, loaders: TrainingLoaders, config: CampHiVeConfig, accelerator: Accelerator
) -> FinetuneLog:
    """Train only the classifier of a timm network in place, for `config.head_epochs` epochs of AdamW.

    All other modules stay in eval mode: neither their weights nor their running statistics change.

    Raises:
        DataError: There are no training images, or the training split is a stream without a length.
        TrainingError: The loss or the gradient is not finite.
    """
    head = set(timm_interface(net).get_classifier().parameters())
    wanted = {p: p.requires_grad for p in net.parameters()}
    for p in net.parameters():
        p.requires_grad_(p in head)
    try:
        run = _TrainingSpec(
            net=net,
            parameters=[p for p in net.parameters() if p in head],
            epochs=config.head_epochs,
            optimizer="adamw",
            learning_rate=HEAD_LEARNING_RATE,
            precision="no" if config.mixed_precision == "auto" else config.mixed_precision,
            training_mode=False,
            teacher=None,
            description="Train head",
        )
        return _train(run, loaders, config, accelerator, store=None, resume=False)
    finally:
        for p, flag in wanted.items():
            p.requires_grad_(flag)


@dataclass(frozen=True)
class _TrainingSpec:
    """Settings of a training run in which finetuning and training a classifier differ."""

    net: nn.Module
    parameters: list[nn.Parameter]
    epochs: float
    optimizer: Literal["sgd", "adamw"]
    learning_rate: float
    precision: AskedPrecision
    training_mode: bool
    teacher: nn.Module | None
    description: str
    keeps_zeros: bool = False


def _train(
    run: _TrainingSpec,
    loaders: TrainingLoaders,
    config: CampHiVeConfig,
    accelerator: Accelerator,
    store: CheckpointStore | None,
    resume: bool,
) -> FinetuneLog:
    if run.epochs == 0:
        return FinetuneLog((), "no", 0)
    checkpoint = store.newest() if store and resume else None
    set_seed(config.seed, device_specific=True)

    with keeping_modes(run.net):
        job = _Trainer(run, loaders, config, accelerator)
        try:
            if store and checkpoint and (progress := store.load(checkpoint, job.fingerprint())):
                job.restore(progress)
            logger.info("%s in %s", run.description, format_precision(job.precision))
            if run.keeps_zeros:
                keep_zeros(job.optimizer.optimizer, run.parameters)
            while job.steps < job.total_steps:
                job.run_epoch()
                if store is not None:
                    store.save(job.progress())
        finally:
            job.release()
    return FinetuneLog(tuple(job.epochs), job.precision, job.steps)


class _Trainer:
    """Run the epochs of one training run: holds what Accelerate prepared, and the steps and epochs done so far."""

    def __init__(
        self,
        run: _TrainingSpec,
        loaders: TrainingLoaders,
        config: CampHiVeConfig,
        accelerator: Accelerator,
    ) -> None:
        train = _require_length(loaders.train)
        self.run, self.config, self.accelerator = run, config, accelerator
        self.precision = choose_precision(run.precision, accelerator.device)
        self.validation, self.generator = loaders.validation, train.generator
        run.net.to(accelerator.device).to(memory_format=torch.channels_last)
        if run.teacher is not None:
            run.teacher.to(accelerator.device).to(memory_format=torch.channels_last).eval()
        optimizer = make_optimizer(run.optimizer, run.parameters, run.learning_rate, config.weight_decay)
        self.model, self.optimizer, self.loader = accelerator.prepare(run.net, optimizer, train)
        self.steps_per_epoch = math.ceil(len(self.loader) / accelerator.gradient_accumulation_steps)
        self.total_steps = math.ceil(round(run.epochs * self.steps_per_epoch, 6))
        warmup = round(config.warmup_ratio * self.total_steps)
        # Accelerate steps a scheduler once per process at every optimizer step: hence the division.
        self.scheduler = accelerator.prepare(
            LambdaLR(optimizer, lambda n: warmup_cosine(n / accelerator.num_processes, warmup, self.total_steps))
        )
        self.steps = 0
        self.epochs: list[EpochLog] = []

    def run_epoch(self) -> None:
        """Train one epoch, which the total number of steps may cut short, then measure validation accuracy and log both.

        Raises:
            TrainingError: The loss or the gradient is not finite.
        """
        began = time.perf_counter()
        loss, rate = self._train_epoch()
        top1 = None
        if self.validation is not None:
            found = evaluate_accuracy(self.run.net, self.validation, self.accelerator, "validation", "Validate")
            top1 = found.top1
        epoch = round(self.steps / self.steps_per_epoch, 4)
        self.epochs.append(EpochLog(epoch, loss, rate, top1, time.perf_counter() - began))
        logger.info("%s, epoch %g of %g: %s", self.run.description, epoch, self.run.epochs, self.epochs[-1])

    def _train_epoch(self) -> tuple[float, float]:
        """Train one epoch and return its mean loss over all processes and its last learning rate."""
        number = len(self.epochs) + 1
        stop = min(self.total_steps, self.steps + self.steps_per_epoch)
        summed, rows, rate = 0.0, 0, 0.0
        self.model.train(self.run.training_mode)
        self.loader.set_epoch(number - 1)  # seeds the shuffling of a streamed split, also when resumed
        bar = Workers(self.accelerator).bar(f"{self.run.description}, epoch {number}", "step", stop - self.steps)
        try:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    rate = self.scheduler.get_last_lr()[0]
                    loss = self._step(batch, f"epoch {number}, step {self.steps + 1} of {self.total_steps}", rate)
                summed, rows = summed + loss * len(batch["labels"]), rows + len(batch["labels"])
                if self.accelerator.sync_gradients:
                    self.steps += 1
                    bar.update()
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.2g}")
                if self.steps == stop:
                    break
        finally:
            # Left unfinished, the loader would stay Accelerate's active one, and Accelerate would accumulate the
            # gradients of later loaders by the end of this one.
            self.loader.end()
            bar.close()
        if self.accelerator.num_processes > 1:
            for buffer in self.run.net.buffers():
                broadcast(buffer)
        both = self.accelerator.reduce(torch.tensor([summed, rows], device=self.accelerator.device), "sum").tolist()
        return both[0] / both[1], rate

    def _step(self, batch: Batch, where: str, rate: float) -> float:
        """Add one batch's gradient, take an optimizer step when enough batches have been added, and return the batch's loss."""
        images = channels_last(batch["pixel_values"])
        with autocast(self.accelerator.device, self.precision):
            soft = None
            if self.run.teacher is not None:
                with torch.no_grad():
                    soft = self.run.teacher(images)
            loss = classification_loss(self.model(images), batch["labels"], soft, self.config)
        value = loss.item()
        # All processes must stop together: one that stopped alone would leave the others waiting for its gradient.
        if not math.isfinite(value):
            self.accelerator.set_trigger()
        if self.accelerator.check_trigger():
            raise self._diverged(f"the loss is {value}", where, rate)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients and self.precision != "fp16":
            norm = torch.nn.utils.get_total_norm(p.grad for p in self.run.parameters if p.grad is not None)
            if not torch.isfinite(norm):
                raise self._diverged(f"the loss is {value:.4g}, but its gradient has norm {norm}", where, rate)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return value

    def _diverged(self, what: str, where: str, rate: float) -> TrainingError:
        return TrainingError(
            f"{self.run.description} cannot go on: {what} in {where} (learning rate {rate:.3g}). This step did not change "
            "the weights. Lower --learning_rate (a tenth is a good start); if this is the first step, check the images "
            "and labels, or prune less"
        )

    def fingerprint(self) -> dict[str, Any]:
        """Return, as JSON values, what a checkpoint must have in common with this run for the run to continue from it."""
        shapes = {name: list(tensor.shape) for name, tensor in self.run.net.state_dict().items()}
        values = {
            **self.config.to_dict(),
            "processes": self.accelerator.num_processes,
            "steps per epoch": self.steps_per_epoch,
            "teacher": self.run.teacher is not None,
            "network": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        }
        return json.loads(json.dumps(values))

    def progress(self) -> TrainingProgress:
        """Return the state to save with a checkpoint."""
        state = None if self.generator is None else base64.b64encode(bytes(self.generator.get_state())).decode()
        return TrainingProgress(self.fingerprint(), self.precision, self.steps, tuple(self.epochs), state)

    def restore(self, progress: TrainingProgress) -> None:
        """Continue from the state that `CheckpointStore.load` returned."""
        self.precision, self.steps, self.epochs = progress.precision, progress.steps, list(progress.epochs)
        if progress.generator is not None:
            state = torch.frombuffer(bytearray(base64.b64decode(progress.generator)), dtype=torch.uint8)
            self.generator.set_state(state)

    def release(self) -> None:
        """Remove Accelerate's wrappers from the network and return it to contiguous memory format."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        for name in ("forward", "_is_accelerate_prepared"):
            self.run.net.__dict__.pop(name, None)
        self.run.net.to(memory_format=torch.contiguous_format)


def _require_length(loader: DataLoader | None) -> DataLoader:
    """Return a training loader that has images and a length.

    Raises:
        DataError: It is missing, empty or a stream without a length.
    """
    try:
        if loader is None or len(loader) == 0:
            raise DataError("there are no training images; set num_train_epochs to 0 or give a split that has some")
    except TypeError as error:
        raise DataError(
            "the training split is streamed and has no length, so an epoch has no end; set max_train_samples"
        ) from error
    return loader
