"""The other libraries that benchmarks hold this one against, each called the fastest way that gives the right result.

`pip install "hf_camphive[benchmarks]"`; the package itself never imports them.
"""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
warnings.filterwarnings("ignore", category=FutureWarning, module="torch")

try:
    import torch_pruning
    from curvlinops import GGNLinearOperator, HessianLinearOperator
    from pyhessian import hessian as PyHessian
except ImportError as error:
    raise SystemExit(f"{error}; the peers come with: pip install 'hf_camphive[benchmarks]'") from error


def pyhessian_product(net: nn.Module, images: Tensor, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """PyHessian's H v, as in its eigenvalues over a data loader: a first gradient and the gradient of <g, v>."""
    peer = _pyhessian(PyHessian, net, images, labels, loader=True)

    def product(vector: Tensor) -> Tensor:
        _, parts = peer.dataloader_hv_product(_parts(net, vector))
        return torch.cat([part.reshape(-1) for part in parts])

    return product


def curvlinops_products(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """H v and J^T R J v of curvlinops."""
    parameters = [weight for weight in net.parameters() if weight.requires_grad]
    arguments = (net, nn.CrossEntropyLoss(), parameters, [(images, labels)])
    hessian = HessianLinearOperator(*arguments, check_deterministic=False)
    gauss_newton = GGNLinearOperator(*arguments, check_deterministic=False)
    return {"hessian": lambda v: hessian @ v, "gauss-newton": lambda v: gauss_newton @ v}


def pyhessian_steps(
    net: nn.Module, images: Tensor, labels: Tensor, tolerance: float, most: int, seed: int
) -> tuple[int, bool]:
    """Least `maxIter` whose vector has residual ||Hv - lambda v|| / |lambda| <= tolerance, and whether `most` reach it.

    PyHessian stops when the value settles and never looks at the vector. Its n-th product shows the residual of the vector
    that n - 1 steps would return.
    """
    steps = 0

    class Reached(Exception):
        pass

    class Watched(PyHessian):
        def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
            nonlocal steps
            value, image = super().dataloader_hv_product(v)
            error = sum(((a - value * b) ** 2).sum() for a, b in zip(image, v)) ** 0.5
            if error <= tolerance * abs(value):
                raise Reached
            steps += 1
            return value, image

    peer = _pyhessian(Watched, net, images, labels, loader=True)
    try:
        torch.manual_seed(seed)
        peer.eigenvalues(maxIter=most + 1, tol=0)
    except Reached:
        return steps, True
    return most, False


def pyhessian_eigenpair(
    net: nn.Module, images: Tensor, labels: Tensor, steps: int, seed: int
) -> Callable[[], tuple[float, Tensor]]:
    """PyHessian's top eigenvalue and vector after this many steps, in its mode for one batch, which differentiates once."""

    def run() -> tuple[float, Tensor]:
        torch.manual_seed(seed)
        values, vectors = _pyhessian(PyHessian, net, images, labels, loader=False).eigenvalues(maxIter=steps, tol=0)
        net.zero_grad()
        return values[0], torch.cat([part.detach().reshape(-1) for part in vectors[0]])

    return run


class _SummedHessian(torch_pruning.importance.GroupHessianImportance):
    """Torch-Pruning's Hessian importance over all samples.

    That of 1.6.1 keeps the last sample's gradient alone: `accumulate_grad` looks a parameter's name up among parameters.
    """

    def accumulate_grad(self, model: nn.Module) -> None:
        for weight in model.parameters():
            if weight.grad is not None:
                if weight not in self._accu_grad:
                    self._accu_grad[weight] = torch.zeros_like(weight)
                self._accu_grad[weight].addcmul_(weight.grad, weight.grad)
                self._counter[weight] = self._counter.get(weight, 0) + 1


def torch_pruning_scores(net: nn.Module, images: Tensor, labels: Tensor, batch: int) -> Callable[[], list[Tensor]]:
    """Hessian importance of all groups. The graph of dependencies is made beforehand.

    `batch` 1 sends each image through alone. With more it is the loop of its documentation: one pass forward for a batch,
    and one pass back through the whole batch for each image.
    """
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=images[:1])
    head = [module for module in net.modules() if isinstance(module, nn.Linear)]
    groups = list(graph.get_all_groups(ignored_layers=head, root_module_types=[nn.Conv2d, nn.Linear]))

    def run() -> list[Tensor]:
        importance = _SummedHessian(group_reduction="sum", normalizer=None)
        for some, answers in zip(images.split(batch), labels.split(batch)):
            for loss in F.cross_entropy(net(some), answers, reduction="none"):
                net.zero_grad()
                loss.backward(retain_graph=batch > 1)
                importance.accumulate_grad(net)
        scores = [importance(group) for group in groups]
        net.zero_grad()
        return scores

    return run


def _pyhessian(kind: type, net: nn.Module, images: Tensor, labels: Tensor, loader: bool) -> PyHessian:
    net.zero_grad()
    data = {"dataloader": [(images, labels)]} if loader else {"data": (images, labels)}
    return kind(net, nn.CrossEntropyLoss(), cuda=images.is_cuda, **data)


def _parts(net: nn.Module, vector: Tensor) -> list[Tensor]:
    parameters = [weight for weight in net.parameters() if weight.requires_grad]
    parts = vector.split([weight.numel() for weight in parameters])
    return [part.view_as(weight) for part, weight in zip(parts, parameters)]
