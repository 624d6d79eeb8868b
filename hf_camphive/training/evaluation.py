"""Measurements on one or several processes: accuracy over a split, and the running statistics of BatchNorm.

No function changes a weight. Networks are passed unwrapped and stay unwrapped. Results are the same on one process and on
several, up to the rounding of sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader

from hf_camphive.core.errors import DataError, TrainingError
from hf_camphive.core.measures import Accuracy
from hf_camphive.core.runtime import Workers
from hf_camphive.network.modes import keeping_modes
from hf_camphive.training.metrics import TopK
from hf_camphive.training.precision import Batch, channels_last

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm


def evaluate_accuracy(
    net: nn.Module, loader: DataLoader, accelerator: Accelerator, split: str, description: str = "Evaluate"
) -> Accuracy:
    """Measure top-1 and top-5 accuracy in full precision, counting every row of the loader exactly once.

    The network is moved to the accelerator's device and evaluated in eval mode; its modes are restored afterwards. Batches
    are divided among processes, and rows that pad the last batch are not counted. `split` names the rows in the result and
    in errors, `description` labels the progress bar.

    Raises:
        DataError: The loader has no images.
        TrainingError: The network's outputs are not finite for some images.
    """
    metric, images, broken = TopK(), 0, 0
    net.to(accelerator.device)
    share = prepare_data_loader(loader, device=accelerator.device, put_on_device=True)
    bar = Workers(accelerator).bar(description, "batch", _length(share))
    with keeping_modes(net), torch.no_grad(), bar:
        net.eval()
        for batch in share:
            logits = net(channels_last(batch["pixel_values"]))
            best = logits.topk(min(5, logits.shape[1])).indices
            best[~logits.isfinite().all(dim=1)] = -1
            best, labels = accelerator.gather_for_metrics((best, batch["labels"]))
            metric.add_batch(predictions=best, references=labels)
            images, broken = images + len(labels), broken + int((best[:, 0] < 0).sum())
            bar.update()
    if images == 0:
        raise DataError(f"split {split!r} has no images to evaluate on; give a split or a dataset that has some")
    if broken:
        raise TrainingError(
            f"the network's outputs are not numbers on {broken:,} of {images:,} images of {split!r}; prune less, or "
            "finetune with a lower --learning_rate"
        )
    found = metric.compute()
    return Accuracy(found["top1"], found["top5"], images, split)


def batchnorms(net: nn.Module) -> dict[str, BatchNorm]:
    """Return every BatchNorm module that keeps running statistics, by name."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def recalibrate_batchnorm(net: nn.Module, loader: DataLoader | Sequence[Batch], accelerator: Accelerator) -> None:
    """Replace the running mean and variance of every BatchNorm by those of the given images; nothing else changes.

    This is PreciseBN ("Rethinking 'Batch' in BatchNorm", arXiv:2105.07576). During the pass, each batch is normalised by
    its own statistics. The mean and unbiased variance over all rows are combined from those of the batches in float64
    (Chan, Golub and LeVeque, 1979), weighted by the number of values, and are therefore exact for the inputs that each
    norm received. On several processes, the batches of a `DataLoader` are divided among them; a sequence must hold this
    process's share only.
    """
    norms = batchnorms(net)
    if not norms:
        return
    net.to(accelerator.device)
    moments: dict[str, _Moments] = {}

    def observe(name: str, norm: BatchNorm, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0]
        variance, mean = torch.var_mean(x, dim=[d for d in range(x.ndim) if d != 1], correction=0)
        _set_statistics(norm, mean, variance)
        seen = _Moments(x.numel() // x.shape[1], mean.cpu().double(), variance.cpu().double())
        moments[name] = moments[name].merge(seen) if name in moments else seen

    hooks = [
        norm.register_forward_pre_hook(lambda module, inputs, name=name: observe(name, module, inputs))
        for name, norm in norms.items()
    ]
    try:
        share = loader
        if isinstance(loader, DataLoader):
            share = prepare_data_loader(loader, device=accelerator.device, put_on_device=True, even_batches=False)
        bar = Workers(accelerator).bar("Recalibrate BatchNorm", "batch", _length(share))
        with keeping_modes(net), bar:
            net.eval()
            for batch in share:
                net(channels_last(batch["pixel_values"]))
                bar.update()
    finally:
        for hook in hooks:
            hook.remove()
    shares = gather_object([moments])
    for name, norm in norms.items():
        if seen := [share_of[name] for share_of in shares if name in share_of]:
            total = reduce(_Moments.merge, seen)
            _set_statistics(norm, total.mean, total.variance * (total.count / max(1, total.count - 1)))


def _set_statistics(norm: BatchNorm, mean: torch.Tensor, variance: torch.Tensor) -> None:
    for buffer, value in ((norm.running_mean, mean), (norm.running_var, variance)):
        if buffer is not None:
            buffer.copy_(value)


@dataclass(frozen=True)
class _Moments:
    """Mean [C] and biased variance [C] per channel over `count` values, in float64."""

    count: int
    mean: torch.Tensor
    variance: torch.Tensor

    def merge(self, other: "_Moments") -> "_Moments":
        """Return the moments of the union of both sets of values (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        share = other.count / count
        gap = other.mean - self.mean
        mean = self.mean + share * gap
        variance = (1 - share) * self.variance + share * other.variance + share * (1 - share) * gap**2
        return _Moments(count, mean, variance)


def _length(loader: DataLoader | Sequence[Batch]) -> int | None:
    """Return the number of batches, or None for a stream, which has no length."""
    try:
        return len(loader)
    except TypeError:
        return None
