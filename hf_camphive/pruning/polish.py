"""Polish: label-free steps that bring the cut network's logits back to the dense network's.

Reconstruction fits one layer at a time; what it leaves is an error that all layers share. A least-squares fit also gives
less variance than what it was fitted to, layer after layer, which BatchNorm can make good: its statistics may go part of
the way to those of the calibration images. Then a short descent on all weights at once, towards the dense network's own
logits on varied calibration images, takes part of the error away. No label is read. It is training in so far as it follows
a gradient: reports state the accuracy before it and after it.
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
    """Gradient `steps` per attempt, the seed of the views, and the precision of forward passes."""

    steps: int
    seed: int = 0
    precision: Precision = "no"


@dataclass(frozen=True)
class Polished:
    """How far a network went: to recalibrated statistics of BatchNorm, and to where the descent of its weights ended."""

    statistics: float = 0.0
    weights: float = 0.0


@dataclass(frozen=True)
class Views:
    """One step's images and what becomes of each: their numbers among all calibration images, and random values [B]."""

    numbers: Tensor
    mirrored: Tensor
    shifts: Tensor  # [B, 2], rows and columns
    partner: Tensor  # in [0, 1): which other image of its batch is mixed in
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
    """Change `net` in place: BatchNorm's statistics, then all weights, by `steps` steps of Adam towards the logits of `dense`.

    Means and standard deviations go part of the way to those of `recalibrated`, the same network with others; where it
    is None they stay. Then min over theta of E_v ||f_theta(v) - f_dense(v)||^2 / K over views v of the calibration
    images, logits [B, K]. A view is mirrored, shifted, mixed with another image and changed in contrast and brightness at
    random (what is asked of the network there is the dense network's answer, whatever it is). Both networks are in eval
    mode.

    How far to go is judged by images that are held out, as they are: of the points between start and end the one with the
    least KL(dense || net) at temperature 4 is taken, for the statistics as for the weights, and the shares of both ways
    are returned. Where that is the weights' start, or the divergence has doubled half-way, a lower learning rate is
    tried; after the lowest the weights stay as they were. The images must have been held out of the reconstruction too:
    those that it fitted look nearer than others are, and stop too early.

    On several processes each computes the gradients of its own images, and `workers` sum them: all end with the same
    weights, which are those of one process up to rounding.
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
    """What the attempts at polishing share: where they begin, their images, and how far the start is from the goal."""

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
        self.own = _Own(calibration)
        self.held_out = held_out.images
        self.targets = [self._target(images) for images in self.held_out]
        self.divergence = self._divergence()

    def restore(self, recalibrated: nn.Module) -> float:
        """Take BatchNorm's statistics to the best point of the line to those of `recalibrated`; the share of the way."""
        start, end = _statistics(self.net), _statistics(recalibrated)
        if not start:
            return 0.0
        return self._best_of(STATISTICS_SHARES, lambda share: _set_statistics(self.net, start, end, share))

    def run(self, learning_rate: float) -> float:
        """Polish from the start, and go to the best point of the line to where that ends; the share of the way."""
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
        """Go to the point of a line that the held out images like best, its start 0 included."""
        divergences = {0.0: self.divergence}
        for share in line:
            go_to(share)
            divergences[share] = self._divergence()
        best = min(divergences, key=divergences.__getitem__)
        go_to(best)
        self.divergence = divergences[best]
        return best

    def _go_to(self, share: float, end: list[Tensor]) -> None:
        """That share of the way from the start to the end."""
        with torch.no_grad():
            for parameter, start, last in zip(self.parameters, self.start, end):
                parameter.copy_(start if share == 0 else torch.lerp(start, last, share))

    def _add_gradients(self, views: Views) -> None:
        if len(images := self.own.render(views)):
            errors = (self._logits(images) - self._target(images)).square().mean(1)
            (errors.sum() / len(views.numbers)).backward()
        _sum_gradients(self.parameters, self.workers)

    def _divergence(self) -> float:
        """KL(dense || net) of logits / `POLISH_TEMPERATURE`, summed over the held out images of all processes."""
        total = torch.zeros(1, dtype=torch.float64, device=float64_device(self.own.images.device))
        with torch.no_grad():
            for images, target in zip(self.held_out, self.targets):
                given, found = (
                    (to_float64(z) / POLISH_TEMPERATURE).log_softmax(1) for z in (target, self._logits(images))
                )
                total += F.kl_div(found, given, reduction="sum", log_target=True)
        return float(self.workers.sum(total))

    def _target(self, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(images.device, self.options.precision):
            return at_least_fp32(self.dense(images))

    def _logits(self, images: Tensor) -> Tensor:
        with autocast(images.device, self.options.precision):
            return at_least_fp32(self.net(images))


class _Own:
    """This process's calibration images, found by their numbers among those of all processes."""

    def __init__(self, calibration: Calibration) -> None:
        self.images = torch.cat(calibration.images)
        self.size, self.total = tuple(self.images.shape[-2:]), calibration.total
        numbers = torch.cat(calibration.indices).cpu()
        self.place = torch.full((calibration.total,), -1)
        self.place[numbers] = torch.arange(len(numbers))
        sizes = torch.tensor([len(batch) for batch in calibration.indices])
        self.batch_size = sizes.repeat_interleave(sizes)
        self.batch_start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)

    def render(self, views: Views) -> Tensor:
        """Those views that are of this process's images, [n, C, H, W].

        An image is mixed with one of its own calibration batch, which is whole on one process.
        """
        place = self.place[views.numbers]
        mine = place >= 0
        place = place[mine]
        partner = self.batch_start[place] + (views.partner[mine] * self.batch_size[place]).long()

        def column(values: Tensor) -> Tensor:
            return values[mine].view(-1, 1, 1, 1).to(self.images)

        images = _moved(self.images[place], views.shifts[mine], views.mirrored[mine])
        images = torch.lerp(images, self.images[partner], column(views.mix))
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * column(views.contrast) + mean + column(views.brightness)
        return channels_last(images)


def _moved(images: Tensor, shifts: Tensor, mirrored: Tensor) -> Tensor:
    """Images [n, C, H, W] shifted by [n, 2] pixels, edges repeated, and mirrored where it says so, [n]."""
    height, width = images.shape[-2:]
    rows = (torch.arange(height) + shifts[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width) + shifts[:, 1:]).clamp(0, width - 1)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    which = torch.arange(len(images))[:, None, None]
    return images.movedim(1, -1)[which, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _draw(total: int, size: tuple[int, int], seed: int) -> Iterator[Views]:
    """Yield views of `total` images without end, the same on every process: each image once before any comes again.

    A step that takes the last images of one round takes others from the next, so that it shows none twice.
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
        numbers, left = left[:count], left[count:]
        mirrored, down, right, partner, mix, contrast, brightness = torch.rand(7, count, generator=generator)
        yield Views(
            numbers=numbers,
            mirrored=mirrored < 0.5,
            shifts=(torch.stack([down, right], dim=1) * (2 * most + 1)).long() - most,
            partner=partner,
            mix=MIX * mix,
            contrast=1 + CONTRAST * (2 * contrast - 1),
            brightness=BRIGHTNESS * (2 * brightness - 1),
        )


def _statistics(net: nn.Module) -> Statistics:
    """Running mean and variance [C] of every BatchNorm that keeps them, as they are now."""
    return [(norm.running_mean.clone(), norm.running_var.clone()) for norm in batchnorms(net).values()]


def _set_statistics(net: nn.Module, start: Statistics, end: Statistics, share: float) -> None:
    """Means and standard deviations at that share of the way."""
    for norm, (mean, variance), (last_mean, last_variance) in zip(batchnorms(net).values(), start, end, strict=True):
        norm.running_mean.copy_(mean.lerp(last_mean, share))
        norm.running_var.copy_(variance if share == 0 else variance.sqrt().lerp(last_variance.sqrt(), share).square())


def _sum_gradients(parameters: list[nn.Parameter], workers: Workers) -> None:
    """Gradients summed over processes, in one message."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = workers.sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for parameter, gradient in zip(parameters, flat.split([parameter.numel() for parameter in parameters])):
        parameter.grad.copy_(gradient.view_as(parameter))


@contextmanager
def _evaluating(net: nn.Module, gradients: bool) -> Iterator[None]:
    """The network in eval mode, with gradients for all of its weights or none; afterwards all is as it was."""
    wanted = {parameter: parameter.requires_grad for parameter in net.parameters()}
    with keeping_modes(net):
        net.eval().requires_grad_(gradients)
        try:
            yield
        finally:
            for parameter, before in wanted.items():
                parameter.requires_grad_(before).grad = None
