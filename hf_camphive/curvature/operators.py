"""Compute products with the curvature of the loss: Hessian or Gauss-Newton matrices over weights or over channel gates.

A `Curvature` maps a block of vectors V [n, k] to A V, where A is the mean over calibration images; all solvers in
`eigensolvers.py` and `estimators.py` take it as their `product`. In gate space a product differentiates twice in reverse:
convolutions are linear and their weights are constant, so one forward and one backward pass serve all k vectors, and each
vector needs one more of both. In weight space it differentiates forward over reverse. J^T R J in gate space can also be
had from the explicit factor of `GatedNetwork.factor`: it takes one backward pass or a few, and then products need no
pass through the network.
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
Point = tuple[Tensor, ...]  # the tensors by which the loss is differentiated: all gates, or some weights
BatchProduct = Callable[[Tensor], Tensor]  # V [n, k] -> A V [n, k], summed over a batch
Logits = Callable[[Point, Tensor], Tensor]
# Parts into which a batch is split, so that a product needs at most twice the memory of a training step on the batch.
GATE_PARTS = {"hessian": 2, "gauss-newton": 1}
WEIGHT_PARTS = {"hessian": 3, "gauss-newton": 2}


@dataclass(frozen=True)
class Curvature:
    """The product V -> A V [n, k] (or v -> A v [n]) with the mean curvature A over `total` images.

    `batches` are the images that this process holds, and `at(images, labels)` returns the product summed over one batch.
    `workers` sum over processes, once for each product; all processes must multiply the same V. Sums are kept in float64,
    so that the result does not depend on how images are split into batches and processes. Each batch is multiplied in
    `parts` parts, because a product needs several times the memory of a gradient.

    With `held`, the passes that all products share (in gate space one forward pass and, for H, one backward pass) are kept:
    a product then takes two passes instead of four (H) or three (J^T R J), and the memory of all images at once.
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
        """Return the product for one part of a batch; with `held` it is made only once."""
        product = self._kept.get((batch, part)) or self.at(*images_and_labels)
        if self.held:
            self._kept[batch, part] = product
        return product


def gate_curvature(
    network: GatedNetwork, batches: Sequence[Batch], matrix: Matrix = "hessian", **options: Any
) -> Curvature:
    """Return the curvature over channel gates, [S, S]: lift^T H lift, or lift^T J^T R J lift for "gauss-newton".

    `options` are fields of `Curvature`.
    """

    def at(images: Tensor, labels: Tensor) -> BatchProduct:
        run = network.run(images)
        return _gate_hessian(run, labels) if matrix == "hessian" else partial(_gate_gauss_newton, run)

    return Curvature(network.gates.size, at, batches, **_counted(batches, {"parts": GATE_PARTS[matrix], **options}))


def _gate_hessian(run: GatedRun, labels: Tensor) -> BatchProduct:
    """Return the product V -> H V [S, k] summed over a batch.

    H v is the gradient of <dL/dm, v>; dL/dm is computed once for all columns v.
    """
    with torch.enable_grad():
        loss = F.cross_entropy(run.logits, labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, run.m, create_graph=True)

    def product(block: Tensor) -> Tensor:
        return torch.stack([torch.autograd.grad(gradient, run.m, v, retain_graph=True)[0] for v in block.T], dim=1)

    return product


def _gate_gauss_newton(run: GatedRun, block: Tensor) -> Tensor:
    """Return J^T R J V [S, k] summed over a batch; it does not depend on labels."""
    outputs = run.logits.detach()
    return torch.stack([run.transposed(_softmax_curvature(outputs, run.tangent(v))) for v in block.T], dim=1)


@dataclass(frozen=True)
class WeightSpace:
    """The layout of some weights of a network in one vector [P]: names and shapes, in order."""

    shapes: Mapping[str, torch.Size]

    @property
    def size(self) -> int:
        """The number P of weights."""
        return sum(shape.numel() for shape in self.shapes.values())

    def split(self, vector: Tensor) -> Point:
        """Return a vector [P] as one tensor for each weight, of its shape."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes.values()))

    def join(self, tensors: Point) -> Tensor:
        """Return one tensor for each weight as a vector [P]."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])


def weight_curvature(
    logits: Callable[[Mapping[str, Tensor], Tensor], Tensor],
    weights: Mapping[str, Tensor],
    batches: Sequence[Batch],
    matrix: Matrix = "hessian",
    compiled: bool = False,
    **options: Any,
) -> tuple[Curvature, WeightSpace]:
    """Return the curvature H or J^T R J [P, P] over the given weights, and the layout of its vectors.

    `logits(weights, images)` must return [N, K]. Products differentiate forward over reverse (Pearlmutter 1994), or reverse
    over reverse, which costs more, once an operation turns out to have no forward derivative. `compiled` passes the
    product through `torch.compile`. `options` are fields of `Curvature`.
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
    """Return `weight_curvature` of any network over the weights `names` (default: all that require gradients).

    Raises:
        CurvatureError: A name is unknown, or `check_deterministic` refuses the network or the batches.
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
    """Return the curvature Z^T Z / total [S, S], Z the rows that `GatedNetwork.factor` returned for all batches.

    `factors` holds the rows [rows, S] of each batch, `total` is the number of images; `options` are fields of `Curvature`.
    """

    def multiply(rows: Tensor, block: Tensor) -> Tensor:
        return rows.T @ (rows @ block)

    return Curvature(
        size, lambda rows, _: partial(multiply, rows), [(rows, rows) for rows in factors], total, **options
    )


def check_deterministic(net: nn.Module, batches: Iterable[Batch]) -> Sequence[Batch]:
    """Return the batches as a list, after checking that every product will use the same network and the same images.

    Raises:
        CurvatureError: Dropout, stochastic depth or a batch norm is in training mode, the network is wrapped in something
            that cannot be differentiated twice (DistributedDataParallel, FSDP, DeepSpeed), its weights are in half
            precision, the loader shuffles, or there are no batches.
    """
    kind = type(net).__name__
    if kind in ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine") or kind.startswith("FSDP"):
        raise CurvatureError(
            f"the network is wrapped in {kind}, whose hooks do not survive a second derivative (and shards are not whole "
            "weights); pass accelerator.unwrap_model(net), and share the images between the processes instead"
        )
    moving = [name or kind for name, module in net.named_modules() if module.training and _is_random(module)]
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
    pairs = [tuple(batch.values())[:2] if isinstance(batch, Mapping) else tuple(batch) for batch in batches]
    if not pairs:
        raise CurvatureError("there are no images to take the curvature at; give at least one batch")
    return [(images, labels) for images, labels in pairs]


def _is_random(module: nn.Module) -> bool:
    """Return whether the result of a module in training mode depends on random numbers or on the rest of the batch."""
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return True
    # `p` is the attribute of torch's dropout layers, `drop_prob` that of timm's DropPath.
    probability = getattr(module, "p", getattr(module, "drop_prob", None))
    return isinstance(probability, float) and probability > 0


def _counted(batches: Sequence[Batch], options: dict) -> dict:
    """Return the options of `Curvature` with `total`, the number of images, set from the batches unless it is given."""
    return {"total": sum(len(images) for images, _ in batches), **options}


def _loss(logits: Logits, point: Point, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy summed over a batch, as a function of the point."""
    return F.cross_entropy(logits(point, images), labels, reduction="sum")


def _softmax_curvature(outputs: Tensor, tangent: Tensor) -> Tensor:
    """Return R t = p * (t - <p, t>) for each row of t [N, K], R the Hessian of the cross-entropy in the logits."""
    p = outputs.softmax(dim=1)
    return p * (tangent - (p * tangent).sum(dim=1, keepdim=True))


def _forward_hessian(
    logits: Logits, point: Point, images: Tensor, labels: Tensor, directions: list[Point]
) -> list[Point]:
    """Return H v summed over a batch for each direction v: the derivative of the gradient along v (Pearlmutter 1994)."""

    def gradient(*point: Tensor) -> Point:
        return torch.func.grad(lambda point: _loss(logits, point, images, labels))(point)

    return [torch.func.jvp(gradient, point, direction)[1] for direction in directions]


def _forward_gauss_newton(
    logits: Logits, point: Point, images: Tensor, labels: Tensor, directions: list[Point]
) -> list[Point]:
    """Return J^T R J v summed over a batch for each direction v; it does not depend on labels."""
    outputs, transposed = torch.func.vjp(lambda *point: logits(point, images), *point)[:2]
    products = []
    for direction in directions:
        tangent = torch.func.jvp(lambda *point: logits(point, images), point, direction)[1]
        products.append(transposed(_softmax_curvature(outputs, tangent)))
    return products


def _reverse_hessian(
    logits: Logits, point: Point, images: Tensor, labels: Tensor, directions: list[Point]
) -> list[Point]:
    """Return H v summed over a batch for each direction v: the gradient of <dL/dw, v>, with dL/dw computed once."""
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
    """Return J^T R J v summed over a batch for each direction v, without forward derivatives.

    J v is the gradient of <J^T w, v> with respect to w, because J^T w is linear in w.
    """
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
