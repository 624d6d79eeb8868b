"""Curvature of the loss, known by its products: Hessian and Gauss-Newton matrices over weights or over channel gates.

A `Curvature` maps a block of vectors V [n, k] to A V, A the mean over calibration images, and so feeds every solver of
`eigensolvers.py` and `estimators.py`. In gate space a product differentiates twice in reverse: convolutions are linear and their
weights stay put, so a pass forward and one back serve all k vectors, and each vector needs one more of both. In weight
space it is forward over reverse. J^T R J in gate space has a third way: the explicit factor of `GatedNetwork.factor`, of
one backward pass or a few, after which products cost nothing.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from hf_camphive.core.errors import CurvatureError
from hf_camphive.core.runtime import ALONE, Workers, is_out_of_memory
from hf_camphive.curvature.gates import GatedNetwork, GatedRun

logger = logging.getLogger(__name__)
Matrix = Literal["hessian", "gauss-newton"]
Batch = tuple[Tensor, Tensor]  # images [N, C, H, W] and labels [N]
Point = tuple[Tensor, ...]  # where the loss is differentiated: all gates, or some weights
BatchProduct = Callable[[Tensor], Tensor]  # V [n, k] -> A V [n, k], summed over a batch
Logits = Callable[[Point, Tensor], Tensor]
# Parts of a batch, so that a product holds no more than twice what a training step on the whole batch does.
GATE_PARTS = {"hessian": 2, "gauss-newton": 1}
WEIGHT_PARTS = {"hessian": 3, "gauss-newton": 2}


@dataclass(frozen=True)
class Curvature:
    """A V [n, k] (or A v [n]) for the mean curvature A over `total` images, of which this process holds `batches`.

    `at(images, labels)` is the product V -> A V summed over a batch. `workers` sum over processes, once per product;
    all of them must ask for the same V. Sums are kept in float64, so that batches and processes may be split in any way;
    each batch is multiplied in so many `parts`, which bounds memory: a product holds several times what a gradient does.
    With `held` what products have in common (in gate space a pass forward and, for H, one back) is kept from one to the
    next: two passes a product in place of four, or three, for the memory of all images at once.
    """

    size: int
    at: Callable[[Tensor, Tensor], BatchProduct]
    batches: Sequence[Batch]
    total: int
    workers: Workers = ALONE
    parts: int = 1
    held: bool = False
    _kept: dict[tuple[int, int], BatchProduct] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(self, vectors: Tensor) -> Tensor:
        block = vectors[:, None] if vectors.dim() == 1 else vectors
        total = torch.zeros(block.shape, dtype=torch.float64)
        for number, (images, labels) in enumerate(self.workers.track(self.batches, "Product", "batch")):
            right = block.to(images.device, images.dtype)
            for part in enumerate(zip(images.chunk(self.parts), labels.chunk(self.parts))):
                with torch.autocast(images.device.type, enabled=False):
                    total += self._product(number, *part)(right).detach().cpu().double()
        return (self.workers.sum(total) / self.total).to(vectors).view_as(vectors)

    def _product(self, batch: int, part: int, images_and_labels: Batch) -> BatchProduct:
        product = self._kept.get((batch, part)) or self.at(*images_and_labels)
        if self.held:
            self._kept[batch, part] = product
        return product


def gate_curvature(
    network: GatedNetwork, batches: Sequence[Batch], matrix: Matrix = "hessian", **options: Any
) -> Curvature:
    """Return lift^T H lift, or lift^T J^T R J lift, [S, S]; `options` are those of `Curvature`."""

    def at(images: Tensor, labels: Tensor) -> BatchProduct:
        run = network.run(images)
        return _gate_hessian(run, labels) if matrix == "hessian" else partial(_gate_gauss_newton, run)

    return Curvature(network.gates.size, at, batches, **_counted(batches, {"parts": GATE_PARTS[matrix], **options}))


def _gate_hessian(run: GatedRun, labels: Tensor) -> BatchProduct:
    """V -> A V [S, k], summed over a batch: the gradient of <dL/dm, v> for each column v, the first derivative shared."""
    with torch.enable_grad():
        loss = F.cross_entropy(run.logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, run.m, create_graph=True)

    def product(block: Tensor) -> Tensor:
        return torch.stack([torch.autograd.grad(gradient, run.m, v, retain_graph=True)[0] for v in block.T], dim=1)

    return product


def _gate_gauss_newton(run: GatedRun, block: Tensor) -> Tensor:
    """J^T R J V [S, k], summed over a batch; labels play no part."""
    outputs = run.logits.detach()
    return torch.stack([run.transposed(_softmax_curvature(outputs, run.tangent(v))) for v in block.T], dim=1)


@dataclass(frozen=True)
class WeightSpace:
    """Weights of a network as one vector: names and shapes, in the order in which they are laid end to end."""

    shapes: Mapping[str, torch.Size]

    @property
    def size(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def split(self, vector: Tensor) -> Point:
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes.values()))

    def join(self, tensors: Point) -> Tensor:
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


def weight_curvature(
    logits: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    matrix: Matrix = "hessian",
    compiled: bool = False,
    **options: Any,
) -> tuple[Curvature, WeightSpace]:
    """H or J^T R J [P, P] over the given weights, and how its vectors are laid out; `logits(weights, images)` is [N, K].

    Forward over reverse; where an operation has no forward derivative, reverse over reverse, which costs more. `compiled`
    sends the product through `torch.compile`. `options` are those of `Curvature`.
    """
    space = WeightSpace({name: weight.shape for name, weight in weights.items()})
    point = tuple(weight.detach() for weight in weights.values())
    ways = [torch.compile(_FORWARD[matrix]) if compiled else _FORWARD[matrix], _REVERSE[matrix]]

    def at(point: Point, images: Tensor) -> Tensor:
        return logits(dict(zip(weights, point)), images)

    def multiply(images: Tensor, labels: Tensor, block: Tensor) -> Tensor:
        arguments = (at, point, images, labels, [space.split(v) for v in block.T])
        try:
            products = ways[0](*arguments)
        except RuntimeError as error:
            if len(ways) == 1 or is_out_of_memory(error):
                raise
            products = ways[1](*arguments)
            del ways[0]
            logger.info("differentiating twice in reverse, since forward over reverse failed: %s", error)
        return torch.stack([space.join(v) for v in products], dim=1)

    return Curvature(
        space.size,
        lambda images, labels: partial(multiply, images, labels),
        batches,
        **_counted(batches, {"parts": WEIGHT_PARTS[matrix], **options}),
    ), space


def network_curvature(
    net: nn.Module,
    batches: Iterable[Batch],
    matrix: Matrix = "hessian",
    names: Iterable[str] | None = None,
    **options: Any,
) -> tuple[Curvature, WeightSpace]:
    """`weight_curvature` of any network, over the weights `names` (all that are trained).

    Raises `CurvatureError` where the loss is a moving target, see `check_deterministic`.
    """
    batches = check_deterministic(net, batches)
    weights = dict(net.named_parameters())
    chosen = [name for name, weight in weights.items() if weight.requires_grad] if names is None else list(names)
    if unknown := [name for name in chosen if name not in weights]:
        raise CurvatureError(
            f"the network has no weight {unknown[0]!r}; name some of {', '.join(list(weights)[:5])}, ..."
        )

    def logits(weights: Mapping[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(net, dict(weights), (images,))

    return weight_curvature(logits, {name: weights[name] for name in chosen}, batches, matrix, **options)


def factored_curvature(factors: Sequence[Tensor], size: int, total: int, **options: Any) -> Curvature:
    """Z^T Z / total [S, S] from the rows that `GatedNetwork.factor` gave for each batch."""

    def multiply(rows: Tensor, block: Tensor) -> Tensor:
        return rows.T @ (rows @ block)

    return Curvature(
        size, lambda rows, _: partial(multiply, rows), [(rows, rows) for rows in factors], total, **options
    )


def check_deterministic(net: nn.Module, batches: Iterable[Batch]) -> Sequence[Batch]:
    """The batches as a list, once it is sure that every product will see the same network and the same images.

    Raises `CurvatureError` for dropout, stochastic depth and norms in training mode, wrappers that cannot be differentiated
    twice (DistributedDataParallel, FSDP, DeepSpeed), loaders that shuffle, and weights in half precision.
    """
    kind = type(net).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine") or kind.startswith("FSDP"):
        raise CurvatureError(
            f"the network is wrapped in {kind}, whose hooks do not survive a second derivative (and shards are not whole "
            "weights); pass accelerator.unwrap_model(net), and share the images between the processes instead"
        )
    moving = [name or kind for name, module in net.named_modules() if module.training and _moves(module)]
    if moving:
        raise CurvatureError(
            f"{', '.join(map(repr, moving[:3]))}{' ...' if len(moving) > 3 else ''} in training mode would make each "
            "product one of another Hessian; call net.eval() first"
        )
    short = sorted(
        {str(weight.dtype) for weight in net.parameters() if weight.dtype in (torch.float16, torch.bfloat16)}
    )
    if short:
        raise CurvatureError(f"weights in {short[0]} are too coarse for second derivatives; call net.float() first")
    if isinstance(batches, DataLoader) and isinstance(batches.sampler, RandomSampler):
        raise CurvatureError(
            "the loader shuffles, so that each product would see other batches; pass shuffle=False, or a list of batches"
        )
    batches = [tuple(batch.values())[:2] if isinstance(batch, Mapping) else tuple(batch) for batch in batches]
    if not batches:
        raise CurvatureError("there are no images to take the curvature at; give at least one batch")
    return batches


def _moves(module: nn.Module) -> bool:
    """Whether a module in training mode draws at random, or looks at the whole batch."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return True
    drawn = getattr(
        module, "p", getattr(module, "drop_prob", None)
    )  # nn.Dropout and its kin; timm's and torchvision's
    return isinstance(drawn, float) and drawn > 0


def _counted(batches: Sequence[Batch], options: dict) -> dict:
    return {"total": sum(len(images) for images, _ in batches), **options}


def _loss(logits: Logits, point: Point, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits(point, images), labels, reduction="sum")


def _softmax_curvature(outputs: Tensor, tangent: Tensor) -> Tensor:
    """R t = p * (t - <p, t>) for each row: the Hessian of the cross-entropy in the logits, times a tangent [N, K]."""
    p = outputs.softmax(dim=1)
    return p * (tangent - (p * tangent).sum(dim=1, keepdim=True))


def _forward_hessian(
    logits: Logits, point: Point, images: Tensor, labels: Tensor, directions: list[Point]
) -> list[Point]:
    """H v summed over a batch for each direction: the derivative of the gradient along v (Pearlmutter 1994)."""

    def gradient(*point: Tensor) -> Point:
        return torch.func.grad(lambda point: _loss(logits, point, images, labels))(point)

    return [torch.func.jvp(gradient, point, direction)[1] for direction in directions]


def _forward_gauss_newton(
    logits: Logits, point: Point, images: Tensor, labels: Tensor, directions: list[Point]
) -> list[Point]:
    """J^T R J v summed over a batch for each direction; labels play no part."""
    outputs, transposed = torch.func.vjp(lambda *point: logits(point, images), *point)
    products = []
    for direction in directions:
        _, tangent = torch.func.jvp(lambda *point: logits(point, images), point, direction)
        products.append(transposed(_softmax_curvature(outputs, tangent)))
    return products


def _reverse_hessian(
    logits: Logits, point: Point, images: Tensor, labels: Tensor, directions: list[Point]
) -> list[Point]:
    """H v summed over a batch: the gradient of <dL/dm, v> for each direction, the first derivative shared."""
    with torch.enable_grad():
        point = tuple(tensor.detach().requires_grad_() for tensor in point)
        gradient = torch.autograd.grad(_loss(logits, point, images, labels), point, create_graph=True)
        return [
            torch.autograd.grad(gradient, point, v, retain_graph=True, allow_unused=True, materialize_grads=True)
            for v in directions
        ]


def _reverse_gauss_newton(
    logits: Logits, point: Point, images: Tensor, labels: Tensor, directions: list[Point]
) -> list[Point]:
    """J^T R J v summed over a batch for each direction: J v is the derivative of w -> J^T w, which is linear."""
    products = []
    with torch.enable_grad():
        point = tuple(tensor.detach().requires_grad_() for tensor in point)
        outputs = logits(point, images)
        w = torch.zeros_like(outputs, requires_grad=True)
        transposed = torch.autograd.grad(outputs, point, w, create_graph=True)
        for v in directions:
            (tangent,) = torch.autograd.grad(transposed, w, v, retain_graph=True)
            inner = _softmax_curvature(outputs.detach(), tangent)
            products.append(torch.autograd.grad(outputs, point, inner, retain_graph=True))
    return products


_FORWARD = {"hessian": _forward_hessian, "gauss-newton": _forward_gauss_newton}
_REVERSE = {"hessian": _reverse_hessian, "gauss-newton": _reverse_gauss_newton}
