"""Polish: label-free steps after the cut that pull the logits towards the dense network's.

Reconstruction fits one layer at a time and leaves an error that all layers share. The output of a least-squares fit also
varies less than its target, in each layer, which BatchNorm can correct: its statistics may move part of the way to those
of the calibration images. A short gradient descent on all weights, towards the dense network's logits on varied
calibration images, then reduces the remaining error. No label is read. Because this follows a gradient, reports state the
accuracy before it and after it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_camphive.core.runtime import ALONE, Workers, float64_device, to_float64
from hf_camphive.network.modes import keeping_modes
from hf_camphive.pruning.tuning import (
    BETAS,
    BRIGHTNESS,
    CONTRAST,
    DIVERGENCE_LIMIT,
    LEARNING_RATES,
    LINE_SHARES,
    MIX,
    POLISH_IMAGES,
    POLISH_PIXELS,
    POLISH_TEMPERATURE,
    SHIFT,
    STATISTICS_SHARES,
    WARMUP,
)
from hf_camphive.training.data.calibration import Calibration
from hf_camphive.training.evaluation import batchnorms
from hf_camphive.training.optimization import warmup_cosine
from hf_camphive.training.precision import Precision, at_least_fp32, autocast, channels_last

Statistics = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class PolishOptions:
    """Set the number of gradient `steps` per attempt, the seed of the views, and the precision of forward passes."""

    steps: int
    seed: int = 0
    precision: Precision = "no"


@dataclass(frozen=True)
class Polished:
    """Record the shares of the way, in [0, 1], to recalibrated BatchNorm statistics and to the end of the gradient steps."""

    statistics: float = 0.0
    weights: float = 0.0


@dataclass(frozen=True)
class Views:
    """Describe the images of one step: their indices among all calibration images, and how each is varied, [B] each."""

    indices: Tensor
    mirrored: Tensor
    shifts: Tensor  # [B, 2], rows and columns
    partner: Tensor  # in [0, 1): position in its batch of the image that is mixed in
    mix: Tensor
    contrast: Tensor
    brightness: Tensor


def polish(
    net: nn.Module,
    dense: nn.Module,
    calibration: Calibration,
    held_out: Calibration,
    options: PolishOptions,
    *,
    recalibrated: nn.Module | None = None,
    workers: Workers = ALONE,
) -> Polished:
    """Pull the logits of `net` towards those of `dense`, in place, and return how far it was changed.

    First, BatchNorm's means and standard deviations move part of the way to those of `recalibrated`, a copy of `net` with
    other statistics; if it is None they stay. Then `steps` steps of Adam on all weights minimise

        E_v ||f_theta(v) - f_dense(v)||^2 / K

    over views v of the calibration images, for logits [B, K]. A view is mirrored, shifted, mixed with another image and
    changed in contrast and brightness at random. Both networks are in eval mode.

    The unchanged images of `held_out` decide how far to go: of the points between start and end, for the statistics and
    then for the weights, the one with the least KL(dense || net) at `POLISH_TEMPERATURE` is taken. If that is the start
    of the weights, or the divergence has exceeded `DIVERGENCE_LIMIT` times its first value half-way, the next lower
    learning rate is tried; after the lowest the weights stay unchanged. These images must have been held out of the
    reconstruction too: images that it fitted look closer to the dense network than others, and would stop too early.

    On several processes each computes the gradients of its own images, and `workers` sums them: all end with the same
    weights, equal to those of one process up to rounding.
    """
    if not (options.steps and calibration.total and held_out.total):
        return Polished()
    with _evaluating(dense, gradients=False), _evaluating(net, gradients=True):
        descent = _PolishRun(net, dense, calibration, held_out, options, workers)
        statistics = descent.restore(recalibrated) if recalibrated else 0.0
        for learning_rate in LEARNING_RATES:
            if share := descent.run(learning_rate):
                return Polished(statistics, share)
    return Polished(statistics)


class _PolishRun:
    """Hold what the attempts at polishing share: the initial weights, the images, and the initial divergence."""

    def __init__(
        self,
        net: nn.Module,
        dense: nn.Module,
        calibration: Calibration,
        held_out: Calibration,
        options: PolishOptions,
        workers: Workers,
    ) -> None:
        self.net, self.dense, self.options, self.workers = net, dense, options, workers
        self.parameters = [parameter for parameter in net.parameters() if parameter.is_floating_point()]
        self.start = [parameter.detach().clone() for parameter in self.parameters]
        self.own = _OwnImages(calibration)
        self.held_out = held_out.images
        self.targets = [self._target(images) for images in self.held_out]
        self.divergence = self._divergence()

    def restore(self, recalibrated: nn.Module) -> float:
        """Move BatchNorm's statistics to the best point on the line to those of `recalibrated`; return the share of the way."""
        start, end = _statistics(self.net), _statistics(recalibrated)
        if not start:
            return 0.0
        return self._best_of(STATISTICS_SHARES, lambda share: _set_statistics(self.net, start, end, share))

    def run(self, learning_rate: float) -> float:
        """Take gradient steps from the start, move to the best point on the line to their end, and return its share."""
        optimizer = torch.optim.Adam(self.parameters, learning_rate, betas=BETAS)
        views, steps = _draw(self.own.total, self.own.size, self.options.seed), self.options.steps
        for step in self.workers.track(range(steps), "Polish", "step"):
            if step == steps // 2 and not self._divergence() <= DIVERGENCE_LIMIT * self.divergence:
                self._go_to(0.0, self.start)
                return 0.0
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * warmup_cosine(step, int(WARMUP * steps), steps)
            optimizer.zero_grad(set_to_none=False)
            self._add_gradients(next(views))
            optimizer.step()
        end = [parameter.detach().clone() for parameter in self.parameters]
        return self._best_of(LINE_SHARES, lambda share: self._go_to(share, end))

    def _best_of(self, line: Sequence[float], go_to: Callable[[float], None]) -> float:
        """Move to the point of a line, its start at 0 included, with the least held-out divergence; return its share."""
        divergences = {0.0: self.divergence}
        for share in line:
            go_to(share)
            divergences[share] = self._divergence()
        best = min(divergences, key=divergences.__getitem__)
        go_to(best)
        self.divergence = divergences[best]
        return best

    def _go_to(self, share: float, end: list[Tensor]) -> None:
        """Set the weights to that share of the way from the start to `end`."""
        with torch.no_grad():
            for parameter, start, last in zip(self.parameters, self.start, end):
                parameter.copy_(start if share == 0 else torch.lerp(start, last, share))

    def _add_gradients(self, views: Views) -> None:
        """Add the gradients of the mean squared error of the logits over one step's views, of all processes."""
        if len(images := self.own.render(views)):
            errors = (self._logits(images) - self._target(images)).square().mean(1)
            (errors.sum() / len(views.indices)).backward()
        _sum_gradients(self.parameters, self.workers)

    def _divergence(self) -> float:
        """Return KL(dense || net) of logits / `POLISH_TEMPERATURE`, summed over the held-out images of all processes."""
        total = torch.zeros(1, dtype=torch.float64, device=float64_device(self.own.images.device))
        with torch.no_grad():
            for images, target in zip(self.held_out, self.targets):
                given, found = (
                    (to_float64(z) / POLISH_TEMPERATURE).log_softmax(1) for z in (target, self._logits(images))
                )
                total += F.kl_div(found, given, reduction="sum", log_target=True)
        return float(self.workers.sum(total))

    def _target(self, images: Tensor) -> Tensor:
        """Return the dense network's logits [B, K], without gradients."""
        with torch.no_grad(), autocast(images.device, self.options.precision):
            return at_least_fp32(self.dense(images))

    def _logits(self, images: Tensor) -> Tensor:
        """Return the cut network's logits [B, K]."""
        with autocast(images.device, self.options.precision):
            return at_least_fp32(self.net(images))


class _OwnImages:
    """Hold this process's calibration images, found by their indices among those of all processes."""

    def __init__(self, calibration: Calibration) -> None:
        self.images = torch.cat(calibration.images)
        self.size, self.total = (self.images.shape[-2], self.images.shape[-1]), calibration.total
        indices = torch.cat(calibration.indices).cpu()
        self.place = torch.full((calibration.total,), -1)
        self.place[indices] = torch.arange(len(indices))
        sizes = torch.tensor([len(batch) for batch in calibration.indices])
        self.batch_size = sizes.repeat_interleave(sizes)
        self.batch_start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)

    def render(self, views: Views) -> Tensor:
        """Return the views of those images that this process holds, [n, C, H, W].

        An image is mixed with one of its own calibration batch, all of which is on one process.
        """
        place = self.place[views.indices]
        mine = place >= 0
        place = place[mine]
        partner = self.batch_start[place] + (views.partner[mine] * self.batch_size[place]).long()

        def column(values: Tensor) -> Tensor:
            """Return this process's values [n, 1, 1, 1], for broadcasting over images."""
            return values[mine].view(-1, 1, 1, 1).to(self.images)

        images = _moved(self.images[place], views.shifts[mine], views.mirrored[mine])
        images = torch.lerp(images, self.images[partner], column(views.mix))
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * column(views.contrast) + mean + column(views.brightness)
        return channels_last(images)


def _moved(images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Shift images [n, C, H, W] by [n, 2] pixels, repeating edges, and mirror those where `mirrored` [n] is true."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height) + shifts[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) + shifts[:, 1:]).clamp(0, width - 1)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    which = torch.arange(len(images))[:, None, None]
    return images.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _draw(total: int, size: tuple[int, int], seed: int) -> Iterator[Views]:
    """Yield views of `total` images without end, the same on every process; each image once before any is repeated.

    A step that spans two rounds takes from the second only images that it has not taken from the first.
    """
    generator = torch.Generator().manual_seed(seed)
    count = min(total, POLISH_IMAGES, max(1, POLISH_PIXELS // (size[0] * size[1])))
    most = torch.tensor(size) // SHIFT
    left = torch.empty(0, dtype=torch.long)
    while True:
        if len(left) < count:
            following = torch.randperm(total, generator=generator)
            repeated = torch.isin(following, left)
            left = torch.cat([left, following[~repeated], following[repeated]])
        indices, left = left[:count], left[count:]
        mirrored, down, right, partner, mix, contrast, brightness = torch.rand(7, count, generator=generator)
        yield Views(
            indices=indices,
            mirrored=mirrored < 0.5,
            shifts=(torch.stack([down, right], dim=1) * (2 * most + 1)).long() - most,
            partner=partner,
            mix=MIX * mix,
            contrast=1 + CONTRAST * (2 * contrast - 1),
            brightness=BRIGHTNESS * (2 * brightness - 1),
        )


def _statistics(net: nn.Module) -> Statistics:
    """Return copies of the running mean and variance [C] of every BatchNorm that keeps them."""
    return [(mean.clone(), variance.clone()) for mean, variance in _running(net)]


def _running(net: nn.Module) -> Statistics:
    """Return the buffers of running mean and variance [C] of every BatchNorm that keeps them."""
    return [(norm.get_buffer("running_mean"), norm.get_buffer("running_var")) for norm in batchnorms(net).values()]


def _set_statistics(net: nn.Module, start: Statistics, end: Statistics, share: float) -> None:
    """Set BatchNorm's means and standard deviations to that share of the way from `start` to `end`."""
    for buffers, (mean, variance), (last_mean, last_variance) in zip(_running(net), start, end, strict=True):
        buffers[0].copy_(mean.lerp(last_mean, share))
        buffers[1].copy_(variance if share == 0 else variance.sqrt().lerp(last_variance.sqrt(), share).square())


def _sum_gradients(parameters: list[nn.Parameter], workers: Workers) -> None:
    """Replace all gradients by their sums over processes, in one message; absent ones count as zero."""
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = workers.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(total.view_as(gradient))


@contextmanager
def _evaluating(net: nn.Module, gradients: bool) -> Iterator[None]:
    """Put a network in eval mode, with gradients for all of its weights or none, and restore both on exit."""
    wanted = {parameter: parameter.requires_grad for parameter in net.parameters()}
    with keeping_modes(net):
        net.eval().requires_grad_(gradients)
        try:
            yield
        finally:
            for parameter, before in wanted.items():
                parameter.requires_grad_(before).grad = None
