"""Gate-space curvature against dense Hessians in weight space."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Chain, ToyResNet, images, randomise

from hf_camphive.curvature import (
    curvature_cotangent,
    gate_gradients,
    gate_space,
    gated_logits,
    gauss_newton_product,
    hessian_product,
    label_cotangent,
    lift,
    restrict,
)
from hf_camphive.graph import named_tensors
from hf_camphive.tracing import trace_network


def case(net: nn.Module, count: int = 5):
    net = randomise(net)
    trace = trace_network(net, (3, 8, 8))
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    labels = torch.arange(count) % 3
    return trace, state, gate_space(trace, state), images(count), labels


def dense_hessian(trace, state, names: list[str], x: Tensor, labels: Tensor) -> Tensor:
    """Hessian of the summed loss in the weights `names`, flattened: [P, P]."""
    sizes = [state[name].numel() for name in names]

    def loss(flat: Tensor) -> Tensor:
        parts = {n: p.view(state[n].shape) for n, p in zip(names, flat.split(sizes))}
        return F.cross_entropy(trace.graph.run({**state, **parts}, x)[0], labels, reduction="sum")

    return torch.func.hessian(loss)(torch.cat([state[name].reshape(-1) for name in names]))


@pytest.mark.parametrize("net", [ToyResNet(nn.Tanh), Chain(), Chain(groups=2)], ids=["residual", "flatten", "grouped"])
def test_gate_hessian_is_lift_transposed_times_hessian_times_lift(net):
    trace, state, gates, x, labels = case(net)
    names = list(gates.inputs)
    u = torch.randn(gates.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lifted = lift(gates, state, u)
    flat = torch.cat([lifted[name].reshape(-1) for name in names])
    product = dense_hessian(trace, state, names, x, labels) @ flat
    parts = {n: p.view(state[n].shape) for n, p in zip(names, product.split([state[n].numel() for n in names]))}
    expected = restrict(gates, state, parts)
    found = hessian_product(trace, state, gates, x, labels, u)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().max() > 1e-3


def test_gates_multiply_what_consumers_read_wherever_a_channel_is_read():
    trace, state, gates, x, _ = case(ToyResNet())
    m = 1 + 0.3 * torch.randn(gates.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scaled = {**state, **lift(gates, state, m)}
    torch.testing.assert_close(
        gated_logits(trace, state, gates, m, x), trace.graph.run(scaled, x)[0], rtol=1e-12, atol=1e-12
    )


def test_products_are_symmetric_linear_and_sum_over_any_batches():
    trace, state, gates, x, labels = case(ToyResNet(nn.Tanh), 7)
    generator = torch.Generator().manual_seed(2)
    u, v = torch.randn(2, gates.size, generator=generator, dtype=torch.float64)
    for product in (hessian_product, gauss_newton_product):
        whole = product(trace, state, gates, x, labels, u)
        parts = sum(product(trace, state, gates, a, b, u) for a, b in zip(x.split([1, 4, 2]), labels.split([1, 4, 2])))
        torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-12)
        other = product(trace, state, gates, x, labels, v)
        torch.testing.assert_close(v @ whole, u @ other, rtol=1e-10, atol=1e-12)
        both = product(trace, state, gates, x, labels, 2 * u - 3 * v)
        torch.testing.assert_close(both, 2 * whole - 3 * other, rtol=1e-10, atol=1e-11)


def test_gauss_newton_product_equals_the_explicit_matrix():
    trace, state, gates, x, labels = case(ToyResNet())
    ones = torch.ones(gates.size, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda m: gated_logits(trace, state, gates, m, x))(ones)
    p = gated_logits(trace, state, gates, ones, x).softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    matrix = torch.einsum("nks,nkl,nlt->st", jacobian, curvature, jacobian)
    u = torch.randn(gates.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = gauss_newton_product(trace, state, gates, x, labels, u)
    torch.testing.assert_close(found, matrix @ u, rtol=1e-10, atol=1e-12)


def test_per_image_gate_gradients_equal_a_loop_over_images():
    trace, state, gates, x, labels = case(Chain(groups=2))
    ones = torch.ones(gates.size, dtype=torch.float64)
    loop = [
        torch.func.grad(lambda m, a=a, b=b: F.cross_entropy(gated_logits(trace, state, gates, m, a), b))(ones)
        for a, b in zip(x.split(1), labels.split(1))
    ]
    torch.testing.assert_close(
        gate_gradients(trace, state, gates, x, lambda z: label_cotangent(z, labels)),
        torch.stack(loop),
        rtol=1e-10,
        atol=1e-12,
    )


def test_curvature_cotangents_have_the_covariance_of_the_softmax():
    """Over all sign patterns, exactly: E[z z^T] = diag(p) - p p^T."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    z, p = curvature_cotangent(logits.expand(16, 4), signs), logits.softmax(1)[0]
    torch.testing.assert_close(z.T @ z / 16, torch.diag(p) - torch.outer(p, p), rtol=1e-12, atol=1e-14)
