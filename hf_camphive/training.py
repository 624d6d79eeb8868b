"""Training and measuring on Accelerate: finetune, train a new head, evaluate, recalibrate BatchNorm.

The only file that prepares anything with an `Accelerator`. Networks come in and go out unwrapped; every function gives
the same result on one process and on several, up to the rounding of sums.

Mixed precision is an autocast of ours around the forward pass, not one that Accelerate wraps around the network: the
choice can then be made per network, and the network that comes out is as it came in. fp16 also needs a gradient
scaler, and that one is Accelerate's.
"""

import base64
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast, gather_object, set_seed
from safetensors import SafetensorError
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm import tqdm

from .config import CampHiVeConfig
from .errors import ConfigError, DataError, TrainingError
from .metrics import TopK
from .precision import Batch, Precision, at_least_fp32, autocast, channels_last, shared_choice
from .report import Accuracy, format_share
from .weight_pruning import keep_zeros

logger = logging.getLogger(__name__)

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
HEAD_LEARNING_RATE = 1e-3
PROGRESS_FILE = "progress.json"
DAMAGED = (OSError, EOFError, RuntimeError, KeyError, TypeError, ValueError, UnpicklingError, SafetensorError)


class TrainingLoaders(Protocol):
    """What training needs of `data.Loaders`."""

    calibration: DataLoader
    train: DataLoader | None
    validation: DataLoader | None


@dataclass(frozen=True)
class EpochLog:
    """After `epoch` epochs: the last one's mean training loss, last learning rate and wall time; validation top-1."""

    epoch: float
    loss: float
    learning_rate: float
    validation_top1: float | None
    seconds: float

    def __str__(self) -> str:
        top1 = "" if self.validation_top1 is None else f", validation top-1 {format_share(self.validation_top1)}"
        return f"loss {self.loss:.3g}{top1}, {self.seconds:.1f} s"


@dataclass(frozen=True)
class FinetuneLog:
    """A training run: its epochs, the precision of its forward passes, the number of optimizer steps."""

    epochs: tuple[EpochLog, ...]
    mixed_precision: str
    steps: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"epochs": [asdict(epoch) for epoch in self.epochs]}


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


def evaluate_accuracy(
    net: nn.Module, loader: DataLoader, accelerator: Accelerator, split: str, description: str = "Evaluate"
) -> Accuracy:
    """Accuracy of the network, in full precision, on every row of the loader exactly once.

    On several processes each takes a share of the batches; rows that pad the last one are not counted.
    Raises `DataError` without images, `TrainingError` where the network's outputs are not numbers.
    """
    metric, images, broken = TopK(), 0, 0
    net.to(accelerator.device)
    modes = _modes(net)
    net.eval()
    share = prepare_data_loader(loader, device=accelerator.device, put_on_device=True)
    with torch.no_grad(), _progress(accelerator, description, _length(share), "batch") as bar:
        for batch in share:
            logits = net(channels_last(batch["pixel_values"]))
            best = logits.topk(min(5, logits.shape[1])).indices
            best[~logits.isfinite().all(dim=1)] = -1
            best, labels = accelerator.gather_for_metrics((best, batch["labels"]))
            metric.add_batch(predictions=best, references=labels)
            images, broken = images + len(labels), broken + int((best[:, 0] < 0).sum())
            bar.update()
    _restore(modes)
    if images == 0:
        raise DataError(f"split {split!r} has no images to evaluate on; give a split or a dataset that has some")
    if broken:
        raise TrainingError(
            f"the network's outputs are not numbers on {broken:,} of {images:,} images of {split!r}; prune less, or "
            "finetune with a lower --learning_rate"
        )
    found = metric.compute()
    return Accuracy(found["top1"], found["top5"], images, split)


def finetune(
    net: nn.Module,
    loaders: TrainingLoaders,
    config: CampHiVeConfig,
    accelerator: Accelerator,
    teacher: nn.Module | None = None,
    checkpoint_dir: Path | str | None = None,
    resume: bool = False,
) -> FinetuneLog:
    """Train the network in place for `config.num_train_epochs`; the last epoch is what counts.

    The loss is (1 - a) CE + a T^2 KL(teacher || net) with a = `config.distillation` (0 without a teacher) and
    T = `config.temperature` (Hinton et al., arXiv:1503.02531); the learning rate rises linearly, then falls along a
    cosine, by optimizer steps. With a `checkpoint_dir` the state is saved there after every epoch, and with `resume`
    a run goes on from it to the very same end. With granularity "weight" zero weights stay zero.

    Raises `TrainingError` on a loss or gradient that is not a number, before it reaches the weights; `ConfigError` on a
    checkpoint of another run.
    """
    run = _Run(
        net=net,
        parameters=[p for p in net.parameters() if p.requires_grad],
        epochs=config.num_train_epochs,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        precision=config.mixed_precision,
        training_mode=True,
        teacher=teacher if config.distillation else None,
        description="Finetune",
        keeps_zeros=config.granularity == "weight",
    )
    store = None if checkpoint_dir is None else _CheckpointStore(Path(checkpoint_dir), accelerator)
    return _train(run, loaders, config, accelerator, store, resume)


def train_head(
    net: nn.Module, loaders: TrainingLoaders, config: CampHiVeConfig, accelerator: Accelerator
) -> FinetuneLog:
    """Train only the classifier of a timm network, for `config.head_epochs` epochs of AdamW.

    The backbone stays in eval mode: neither its weights nor its running statistics change.
    """
    head = set(net.get_classifier().parameters())
    wanted = {p: p.requires_grad for p in net.parameters()}
    for p in net.parameters():
        p.requires_grad_(p in head)
    try:
        run = _Run(
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


@torch.no_grad()
def recalibrate_batchnorm(net: nn.Module, loader: DataLoader | Sequence[Batch], accelerator: Accelerator) -> None:
    """Replace the running statistics of every BatchNorm by those of the loader's images; nothing else changes.

    Each batch is normalised by its own statistics on the way; the mean and (unbiased) variance of all rows are merged
    from the batches' by Chan's formula in float64, weighted by rows, so that they are exact given each norm's inputs
    (PreciseBN; "Rethinking Batch in BatchNorm", arXiv:2105.07576). On several processes a loader's batches are shared
    out; a sequence holds this process's share already.
    """
    norms = {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, BATCHNORMS) and module.running_mean is not None
    }
    if not norms:
        return
    net.to(accelerator.device)
    moments: dict[str, _Moments] = {}

    def observe(name: str, norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        variance, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
        seen = _Moments(x.numel() // x.shape[1], mean.cpu().double(), variance.cpu().double())
        moments[name] = moments[name].merge(seen) if name in moments else seen

    hooks = [
        norm.register_forward_pre_hook(lambda module, inputs, name=name: observe(name, module, inputs))
        for name, norm in norms.items()
    ]
    modes = _modes(net)
    net.eval()
    try:
        share = loader
        if isinstance(loader, DataLoader):
            share = prepare_data_loader(loader, device=accelerator.device, put_on_device=True, even_batches=False)
        with _progress(accelerator, "Recalibrate BatchNorm", _length(share), "batch") as bar:
            for batch in share:
                net(channels_last(batch["pixel_values"]))
                bar.update()
    finally:
        for hook in hooks:
            hook.remove()
        _restore(modes)
    shares = gather_object([moments])
    for name, norm in norms.items():
        if seen := [share_of[name] for share_of in shares if name in share_of]:
            total = reduce(_Moments.merge, seen)
            norm.running_mean.copy_(total.mean)
            norm.running_var.copy_(total.variance * (total.count / max(1, total.count - 1)))


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


@dataclass(frozen=True)
class _Moments:
    """Mean and (biased) variance per channel over `count` values, float64."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor

    def merge(self, other: "_Moments") -> "_Moments":
        """Moments of both sets together (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        share = other.count / count
        gap = other.mean - self.mean
        mean = self.mean + share * gap
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * gap**2
        return _Moments(count, mean, variance)


@dataclass(frozen=True)
class _Run:
    """What is trained, and how; the parts in which finetuning and training a head differ."""

    net: nn.Module
    parameters: list[nn.Parameter]
    epochs: float
    optimizer: str
    learning_rate: float
    precision: str
    training_mode: bool
    teacher: nn.Module | None
    description: str
    keeps_zeros: bool = False


@dataclass(frozen=True)
class _Progress:
    """What a checkpoint holds beside Accelerate's own files; `generator` is the state of the shuffling."""

    fingerprint: dict[str, Any]
    precision: Precision
    steps: int
    epochs: tuple[EpochLog, ...]
    generator: str | None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "_Progress":
        return cls(**values | {"epochs": tuple(EpochLog(**epoch) for epoch in values["epochs"])})


@dataclass(frozen=True)
class _CheckpointStore:
    """The newest complete checkpoint of a run in a folder: written beside the last one, then renamed."""

    folder: Path
    accelerator: Accelerator

    def newest(self) -> Path | None:
        return max(self.folder.glob("epoch-*"), key=lambda path: int(path.name.partition("-")[2]), default=None)

    def save(self, progress: _Progress) -> None:
        draft, final = self.folder / "unfinished", self.folder / f"epoch-{len(progress.epochs)}"
        if self.accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(draft))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (draft / PROGRESS_FILE).write_text(json.dumps(asdict(progress)))
            shutil.rmtree(final, ignore_errors=True)
            draft.rename(final)
            for old in set(self.folder.glob("epoch-*")) - {final}:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Path, fingerprint: Mapping[str, Any]) -> _Progress:
        """Bring everything prepared back to the checkpoint; raises `ConfigError` where it is another run's."""
        try:
            progress = _Progress.from_dict(json.loads((checkpoint / PROGRESS_FILE).read_text()))
            before = progress.fingerprint
            if differing := sorted(
                k for k in before.keys() | fingerprint.keys() if before.get(k) != fingerprint.get(k)
            ):
                raise ConfigError(
                    f"the checkpoint {checkpoint} is of a run with other settings ({', '.join(differing)}); "
                    "resume with the same command, or start afresh without --resume"
                )
            self.accelerator.load_state(str(checkpoint))
        except DAMAGED as error:
            if isinstance(error, ConfigError):
                raise
            raise TrainingError(
                f"the checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}); "
                "delete it to start finetuning afresh"
            ) from error
        return progress


def _train(
    run: _Run,
    loaders: TrainingLoaders,
    config: CampHiVeConfig,
    accelerator: Accelerator,
    store: _CheckpointStore | None,
    resume: bool,
) -> FinetuneLog:
    if run.epochs == 0:
        return FinetuneLog((), "no", 0)
    _require_length(loaders.train)
    checkpoint = store.newest() if store and resume else None
    precision = run.precision
    if precision == "auto" and checkpoint is None:
        precision = shared_choice(run.net, next(iter(loaders.calibration)), config, accelerator)
    set_seed(config.seed, device_specific=True)

    modes = _modes(run.net)
    job = _Job(run, loaders, config, accelerator, precision)
    try:
        if checkpoint is not None:
            job.restore(store.load(checkpoint, job.fingerprint()))
        if run.keeps_zeros:
            keep_zeros(job.optimizer.optimizer, run.parameters)
        while job.steps < job.total_steps:
            job.run_epoch()
            if store is not None:
                store.save(job.progress())
    finally:
        job.release()
        _restore(modes)
    return FinetuneLog(tuple(job.epochs), job.precision, job.steps)


class _Job:
    """A training run under way: what Accelerate prepared, and how far it has come."""

    def __init__(
        self,
        run: _Run,
        loaders: TrainingLoaders,
        config: CampHiVeConfig,
        accelerator: Accelerator,
        precision: Precision,
    ):
        self.run, self.config, self.accelerator, self.precision = run, config, accelerator, precision
        self.validation, self.generator = loaders.validation, loaders.train.generator
        run.net.to(accelerator.device, memory_format=torch.channels_last)
        if run.teacher is not None:
            run.teacher.to(accelerator.device, memory_format=torch.channels_last).eval()
        optimizer = _optimizer(run, config)
        self.model, self.optimizer, self.loader = accelerator.prepare(run.net, optimizer, loaders.train)
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
        """Train until the end of the loader or of the last, perhaps shorter, epoch; then validate and log."""
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
        number = len(self.epochs) + 1
        stop = min(self.total_steps, self.steps + self.steps_per_epoch)
        summed, rows, rate = 0.0, 0, 0.0
        self.model.train(self.run.training_mode)
        self.loader.set_epoch(number - 1)  # a streamed split is shuffled by it, also after a resumption
        bar = _progress(
            self.accelerator, f"{self.run.description}, epoch {number}", total=stop - self.steps, unit="step"
        )
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
            # A loader left half-way would stay Accelerate's active one, by whose end later ones are judged.
            self.loader.end()
            bar.close()
        if self.accelerator.num_processes > 1:
            for buffer in self.run.net.buffers():
                broadcast(buffer)
        both = self.accelerator.reduce(torch.tensor([summed, rows], device=self.accelerator.device), "sum").tolist()
        return both[0] / both[1], rate

    def _step(self, batch: Batch, where: str, rate: float) -> float:
        """One batch's share of an optimizer step; its loss."""
        images = channels_last(batch["pixel_values"])
        with autocast(self.accelerator.device, self.precision):
            soft = None
            if self.run.teacher is not None:
                with torch.no_grad():
                    soft = self.run.teacher(images)
            loss = classification_loss(self.model(images), batch["labels"], soft, self.config)
        value = loss.item()
        # Every process must learn of it, or the others wait for ever.
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
            f"{self.run.description} cannot go on: {what} in {where} (learning rate {rate:.3g}). The weights were not "
            "touched by this step. Lower --learning_rate (a tenth is a good start); where it is the very first step, "
            "look at the images and labels, or prune less"
        )

    def fingerprint(self) -> dict[str, Any]:
        """What a run must share with a checkpoint to go on from it, as JSON gives it back."""
        shapes = {name: list(tensor.shape) for name, tensor in self.run.net.state_dict().items()}
        values = {
            **self.config.to_dict(),
            "processes": self.accelerator.num_processes,
            "steps per epoch": self.steps_per_epoch,
            "teacher": self.run.teacher is not None,
            "network": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        }
        return json.loads(json.dumps(values))

    def progress(self) -> _Progress:
        state = None if self.generator is None else base64.b64encode(bytes(self.generator.get_state())).decode()
        return _Progress(self.fingerprint(), self.precision, self.steps, tuple(self.epochs), state)

    def restore(self, progress: _Progress) -> None:
        self.precision, self.steps, self.epochs = progress.precision, progress.steps, list(progress.epochs)
        if progress.generator is not None:
            state = torch.frombuffer(bytearray(base64.b64decode(progress.generator)), dtype=torch.uint8)
            self.generator.set_state(state)

    def release(self) -> None:
        """Give the network back as it came: without wrappers, in the usual memory layout."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        for name in ("forward", "_is_accelerate_prepared"):
            self.run.net.__dict__.pop(name, None)
        self.run.net.to(memory_format=torch.contiguous_format)


def _optimizer(run: _Run, config: CampHiVeConfig) -> torch.optim.Optimizer:
    """SGD or AdamW; norms, biases and other vectors do not decay."""
    groups = [
        {"params": [p for p in run.parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in run.parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if run.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=run.learning_rate)
    return torch.optim.SGD(groups, lr=run.learning_rate, momentum=0.9, nesterov=True)


def _modes(net: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in net.modules()}


def _restore(modes: Mapping[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _require_length(loader: DataLoader | None) -> None:
    try:
        if loader is None or len(loader) == 0:
            raise DataError("there are no training images; set num_train_epochs to 0 or give a split that has some")
    except TypeError as error:
        raise DataError(
            "the training split is streamed and has no length, so that an epoch has no end; set max_train_samples"
        ) from error


def _progress(accelerator: Accelerator, description: str, total: int | None, unit: str) -> tqdm:
    """A progress bar on the main process, and on no other."""
    return tqdm(
        desc=description,
        total=total,
        unit=unit,
        leave=False,
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )


def _length(loader: DataLoader) -> int | None:
    try:
        return len(loader)
    except TypeError:
        return None
