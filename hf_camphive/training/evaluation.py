"""Measuring on Accelerate: accuracy over a split, and the running statistics of BatchNorm over given images.

No weight changes. Networks come in and go out unwrapped; each function gives the same result on one process and on
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

BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def evaluate_accuracy(
    net: nn.Module, loader: DataLoader, accelerator: Accelerator, split: str, description: str = "Evaluate"
) -> Accuracy:
    """Accuracy of the network, in full precision, on every row of the loader exactly once.

    On several processes each takes a share of the batches; rows that pad the last one are not counted.
    Raises `DataError` without images, `TrainingError` where the network's outputs are not numbers.
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


def batchnorms(net: nn.Module) -> dict[str, nn.Module]:
    """Every BatchNorm that keeps running statistics, by name."""
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, BATCHNORMS) and module.running_mean is not None
    }


@torch.no_grad()
def recalibrate_batchnorm(net: nn.Module, loader: DataLoader | Sequence[Batch], accelerator: Accelerator) -> None:
    """Replace the running statistics of every BatchNorm by those of the loader's images; nothing else changes.

    Each batch is normalised by its own statistics on the way; the mean and (unbiased) variance of all rows are merged
    from the batches' by Chan's formula in float64, weighted by rows, so that they are exact given each norm's inputs
    (PreciseBN; "Rethinking Batch in BatchNorm", arXiv:2105.07576). On several processes a loader's batches are shared
    out; a sequence holds this process's share already.
    """
    norms = batchnorms(net)
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
            norm.running_mean.copy_(total.mean)
            norm.running_var.copy_(total.variance * (total.count / max(1, total.count - 1)))


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


def _length(loader: DataLoader | Sequence[Batch]) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a stream
        return None
