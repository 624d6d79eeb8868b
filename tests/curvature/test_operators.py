"""Products with the curvature of the loss against dense matrices, over gates and over weights, and what is refused."""

import itertools
import logging
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from scipy.sparse.linalg import LinearOperator, eigsh
from support.toys import Chain, ToyResNet, images, randomise
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_camphive import CampHiVeConfig, load_base, load_loaders
from hf_camphive.core.errors import CurvatureError
from hf_camphive.core.runtime import Workers
from hf_camphive.curvature.cotangents import curvature_cotangent, label_cotangent, softmax_factors
from hf_camphive.curvature.eigensolvers import SolverOptions, lanczos
from hf_camphive.curvature.estimators import SamplingOptions, hutchinson
from hf_camphive.curvature.gates import GatedNetwork, gate_space, lift, restrict
from hf_camphive.curvature.operators import factored_curvature, gate_curvature, network_curvature
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.graph.tracing import trace_network

NETS = {
    "residual": lambda: ToyResNet(nn.Tanh),
    "flatten": lambda: Chain(),
    "grouped": lambda: Chain(groups=2),
    "norm after add": lambda: NormAfterAdd(),
}
MATRICES = ("hessian", "gauss-newton")


class NormAfterAdd(nn.Module):
    """What cannot be folded: a norm that reads a sum, one whose convolution has a second reader, "same" padding."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding="same"), nn.Conv2d(6, 6, 1)
        self.norm, self.last, self.head = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).tanh()
        y = self.two(x)
        return self.head((self.last(self.norm(x + y) + y)).sigmoid().mean((2, 3)))


def case(net: nn.Module, count: int = 5):
    torch.manual_seed(0)
    net = randomise(net)
    trace = trace_network(net, (3, 8, 8))
    state = {name: tensor.detach() for name, tensor in named_tensors(net).items()}
    return trace, state, gate_space(trace, state), images(count), torch.arange(count) % 3


def logits_at(trace, state, gates, m: Tensor, x: Tensor) -> Tensor:
    """The oracle: gates as factors of the consumers' weights, in the graph as it was traced."""
    return trace.graph.run({**state, **lift(gates, state, m)}, x)[0]


def softmax_curvature(logits: Tensor) -> Tensor:
    p = logits.softmax(1)
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def dense_gate_matrix(trace, state, gates, x: Tensor, labels: Tensor, matrix: str) -> Tensor:
    ones = torch.ones(gates.size, dtype=torch.float64)
    if matrix == "hessian":
        return torch.func.hessian(lambda m: F.cross_entropy(logits_at(trace, state, gates, m, x), labels))(ones)
    jacobian = torch.func.jacrev(lambda m: logits_at(trace, state, gates, m, x))(ones)
    outer = softmax_curvature(logits_at(trace, state, gates, ones, x))
    return torch.einsum("nks,nkl,nlt->st", jacobian, outer, jacobian) / len(x)


def block(size: int, columns: int = 3) -> Tensor:
    return torch.randn(size, columns, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("net", NETS)
def test_gate_products_equal_the_dense_matrix(net, matrix):
    trace, state, gates, x, labels = case(NETS[net]())
    v = block(gates.size)
    expected = dense_gate_matrix(trace, state, gates, x, labels, matrix) @ v
    found = gate_curvature(GatedNetwork(trace, state), [(x, labels)], matrix)
    torch.testing.assert_close(found(v), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found(v[:, 1]), expected[:, 1], rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 1e-4


def test_gate_hessian_is_lift_transposed_times_hessian_times_lift():
    trace, state, gates, x, labels = case(ToyResNet(nn.Tanh))
    names = list(gates.inputs)
    sizes = [state[name].numel() for name in names]

    def parts(flat: Tensor) -> dict[str, Tensor]:
        return {name: part.view(state[name].shape) for name, part in zip(names, flat.split(sizes))}

    def loss(flat: Tensor) -> Tensor:
        return F.cross_entropy(trace.graph.run({**state, **parts(flat)}, x)[0], labels)

    hessian = torch.func.hessian(loss)(torch.cat([state[name].reshape(-1) for name in names]))
    u = block(gates.size, 1)[:, 0]
    lifted = torch.cat([lift(gates, state, u)[name].reshape(-1) for name in names])
    found = gate_curvature(GatedNetwork(trace, state), [(x, labels)])(u)
    torch.testing.assert_close(found, restrict(gates, state, parts(hessian @ lifted)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_a_run_is_differentiated_forward_and_back(net, each):
    trace, state, gates, x, _ = case(NETS[net]())
    ones, u = torch.ones(gates.size, dtype=torch.float64), block(gates.size, 1)[:, 0]
    run = GatedNetwork(trace, state).run(x, each)
    expected, tangent = torch.func.jvp(lambda m: logits_at(trace, state, gates, m, x), (ones,), (u,))
    torch.testing.assert_close(run.logits, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(run.tangent(u.expand(run.m.shape)), tangent, rtol=1e-10, atol=1e-12)
    z = block(len(x), 3)
    found = run.transposed(z)
    torch.testing.assert_close((found * u).sum(), (z * tangent).sum(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("matrix", MATRICES)
def test_products_are_symmetric_linear_and_the_same_for_any_batches(matrix):
    trace, state, gates, x, labels = case(ToyResNet(nn.Tanh), 7)
    whole = gate_curvature(GatedNetwork(trace, state), [(x, labels)], matrix)
    split = list(zip(x.split([1, 4, 2]), labels.split([1, 4, 2])))
    v = block(gates.size)
    product = whole(v)
    torch.testing.assert_close(v.T @ product, product.T @ v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        whole(2 * v[:, 0] - 3 * v[:, 1]), 2 * product[:, 0] - 3 * product[:, 1], rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        gate_curvature(GatedNetwork(trace, state), split, matrix)(v), product, rtol=1e-11, atol=1e-13
    )


@pytest.mark.parametrize("matrix", MATRICES)
def test_held_products_are_the_same_and_run_the_network_once(matrix, monkeypatch):
    trace, state, gates, x, labels = case(ToyResNet(nn.Tanh), 7)
    batches = list(zip(x.split(4), labels.split(4)))
    v = block(gates.size)
    expected = gate_curvature(GatedNetwork(trace, state), batches, matrix)(v)
    runs, run = [], GatedNetwork.run
    monkeypatch.setattr(GatedNetwork, "run", lambda *a: runs.append(a) or run(*a))
    held = gate_curvature(GatedNetwork(trace, state), batches, matrix, held=True, parts=2)
    for _ in range(3):
        torch.testing.assert_close(held(v), expected, rtol=1e-11, atol=1e-13)
    assert len(runs) == 4


def all_signs(classes: int) -> list[Tensor]:
    return [torch.tensor(signs) for signs in itertools.product((1, -1), repeat=classes)]


def test_the_factor_with_a_pass_less_than_classes_is_the_gauss_newton_matrix():
    trace, state, gates, x, labels = case(ToyResNet())
    expected = dense_gate_matrix(trace, state, gates, x, labels, "gauss-newton")
    rows = GatedNetwork(trace, state).factor(x, 2, torch.ones(len(x), 3))
    torch.testing.assert_close(rows.T @ rows / len(x), expected, rtol=1e-10, atol=1e-13)
    more = GatedNetwork(trace, state).factor(x, 7, torch.ones(len(x), 3))
    torch.testing.assert_close(more, rows, rtol=0, atol=0)
    parts = [rows[:4], rows[4:]]
    v = block(gates.size)
    torch.testing.assert_close(factored_curvature(parts, gates.size, len(x))(v), expected @ v, rtol=1e-10, atol=1e-13)


def test_the_factor_of_one_pass_is_the_gauss_newton_matrix_on_average():
    trace, state, gates, x, labels = case(ToyResNet())
    factors = [GatedNetwork(trace, state).factor(x, 1, signs.expand(len(x), 3)) for signs in all_signs(3)]
    assert all(len(rows) == len(x) for rows in factors)
    mean = sum(rows.T @ rows for rows in factors) / len(factors) / len(x)
    expected = dense_gate_matrix(trace, state, gates, x, labels, "gauss-newton")
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-13)
    assert (factors[0].T @ factors[0] / len(x) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("p", [[0.7, 0.1, 0.2, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
def test_softmax_factors_have_the_curvature_of_the_softmax(p, count):
    p = torch.tensor(p, dtype=torch.float64)
    logits = p.clamp_min(1e-300).log()
    found = torch.stack([softmax_factors(logits[None], signs[None], count)[:, 0] for signs in all_signs(4)])
    assert found.shape == (16, min(count, 3), 4)
    mean = torch.einsum("szk,szl->kl", found, found) / len(found)
    torch.testing.assert_close(mean, torch.diag(p) - torch.outer(p, p), rtol=1e-12, atol=1e-15)
    if p.max() < 1:  # else there is nothing to tell apart
        assert bool((found == found[:1]).all()) == (count >= 3)


def test_per_image_gate_gradients_equal_a_loop_over_images():
    trace, state, gates, x, labels = case(Chain(groups=2))
    ones = torch.ones(gates.size, dtype=torch.float64)
    loop = [
        torch.func.grad(lambda m, a=a, b=b: F.cross_entropy(logits_at(trace, state, gates, m, a), b))(ones)
        for a, b in zip(x.split(1), labels.split(1))
    ]
    found = GatedNetwork(trace, state).gradients(x, lambda z: label_cotangent(z, labels))
    torch.testing.assert_close(found, torch.stack(loop), rtol=1e-10, atol=1e-12)


def test_curvature_cotangents_have_the_covariance_of_the_softmax():
    """Over all sign patterns, exactly: E[z z^T] = diag(p) - p p^T."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.5]], dtype=torch.float64)
    z = curvature_cotangent(logits.expand(16, 4), signs)
    torch.testing.assert_close(z.T @ z / 16, softmax_curvature(logits)[0], rtol=1e-12, atol=1e-14)


class NoForwardDerivative(torch.autograd.Function):
    """tanh whose author wrote a derivative for reverse mode only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(y := x.tanh())
        return y

    @staticmethod
    def backward(ctx, z):
        (y,) = ctx.saved_tensors
        return z * (1 - y**2)


class Small(nn.Module):
    """Convolution, norm, residual add: few enough weights for a dense Hessian."""

    def __init__(self, act=torch.tanh) -> None:
        super().__init__()
        self.stem, self.norm, self.conv = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.head, self.act = nn.Linear(3, 3), act

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        return self.head((x + self.act(self.conv(x))).mean((2, 3)))


def small(act=torch.tanh) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return randomise(Small(act)), images(4), torch.arange(4) % 3


def dense_weight_matrix(net: nn.Module, names: list[str], x: Tensor, labels: Tensor, matrix: str) -> Tensor:
    weights = dict(net.named_parameters())
    sizes = [weights[name].numel() for name in names]

    def logits(flat: Tensor) -> Tensor:
        parts = {name: part.view(weights[name].shape) for name, part in zip(names, flat.split(sizes))}
        return torch.func.functional_call(net, parts, (x,))

    point = torch.cat([weights[name].detach().reshape(-1) for name in names])
    if matrix == "hessian":
        return torch.func.hessian(lambda flat: F.cross_entropy(logits(flat), labels))(point)
    jacobian = torch.func.jacrev(logits)(point)
    return torch.einsum("nkp,nkl,nlq->pq", jacobian, softmax_curvature(logits(point)), jacobian) / len(x)


@pytest.mark.parametrize("matrix", MATRICES)
def test_weight_products_equal_the_dense_matrix(matrix):
    net, x, labels = small()
    found, space = network_curvature(net, zip(x.split([1, 3]), labels.split([1, 3])), matrix)
    v = block(space.size)
    expected = dense_weight_matrix(net, list(space.shapes), x, labels, matrix) @ v
    torch.testing.assert_close(found(v), expected, rtol=1e-10, atol=1e-12)
    some, _ = network_curvature(net, [(x, labels)], matrix, names=["conv.weight", "norm.bias"])
    v = block(some.size)
    expected = dense_weight_matrix(net, ["conv.weight", "norm.bias"], x, labels, matrix) @ v
    torch.testing.assert_close(some(v), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("matrix", MATRICES)
def test_an_operation_without_forward_derivative_is_differentiated_in_reverse_and_said_once(matrix, caplog):
    net, x, labels = small()
    other = small(NoForwardDerivative.apply)[0]
    expected, space = network_curvature(net, [(x, labels)], matrix)
    found, _ = network_curvature(other, [(x, labels)], matrix)
    v = block(space.size)
    with caplog.at_level(logging.INFO, "hf_camphive.curvature.operators"):
        torch.testing.assert_close(found(v), expected(v), rtol=1e-10, atol=1e-12)
        found(v)
    assert len([record for record in caplog.records if "in reverse" in record.message]) == 1


def test_a_lack_of_memory_is_not_taken_for_a_missing_derivative(caplog):
    """The first product asks for a pebibyte, as one of too large a batch does; the second would find the memory."""
    asked = []

    def act(x: Tensor) -> Tensor:
        if not asked:
            asked.append(True)
            torch.empty(2**48)
        return torch.tanh(x)

    net, x, labels = small(act)
    found, space = network_curvature(net, [(x, labels)])
    with (
        caplog.at_level(logging.INFO, "hf_camphive.curvature.operators"),
        pytest.raises(RuntimeError, match="allocate memory"),
    ):
        found(block(space.size))
    assert "in reverse" not in caplog.text


def test_an_error_that_both_ways_share_is_the_user_s_to_see():
    net, x, labels = small()
    found, space = network_curvature(net, [(x[:, :2], labels)])
    with pytest.raises(RuntimeError, match="channels"):
        found(block(space.size))


@pytest.mark.slow
def test_compiled_products_are_the_same():
    net, x, labels = small()
    expected, space = network_curvature(net, [(x, labels)])
    found, _ = network_curvature(net, [(x, labels)], compiled=True)
    torch.testing.assert_close(found(block(space.size)), expected(block(space.size)), rtol=1e-8, atol=1e-10)


def test_products_are_in_full_precision_whatever_surrounds_them():
    trace, state, gates, x, labels = case(ToyResNet())
    state, x = {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, x.float()
    product = gate_curvature(GatedNetwork(trace, state), [(x, labels)], "gauss-newton")
    v = block(gates.size).float()
    expected = product(v)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(product(v), expected, rtol=0, atol=0)


def test_eigenpairs_equal_those_of_scipy_on_the_same_operator():
    trace, state, gates, x, labels = case(ToyResNet(nn.Tanh))
    product = gate_curvature(GatedNetwork(trace, state), [(x, labels)])
    generator = torch.Generator().manual_seed(0)
    found = lanczos(product, gates.size, 3, SolverOptions(9, 1e-9, generator, torch.float64))
    operator = LinearOperator(
        (gates.size, gates.size), matvec=lambda v: product(torch.tensor(v).flatten()).numpy(), dtype=float
    )
    expected = torch.tensor(eigsh(operator, 3, which="LM", tol=1e-12)[0].copy())
    torch.testing.assert_close(found.values.sort().values, expected.sort().values, rtol=1e-8, atol=1e-12)


def test_hutchinson_is_within_its_error_of_the_exact_trace():
    trace, state, gates, x, labels = case(ToyResNet(nn.Tanh))
    exact = dense_gate_matrix(trace, state, gates, x, labels, "hessian").trace()
    product = gate_curvature(GatedNetwork(trace, state), [(x, labels)])
    found = hutchinson(
        product, gates.size, 64, SamplingOptions(torch.Generator().manual_seed(0), dtype=torch.float64)
    ).trace
    assert 0 < found.error < 0.5 * exact.abs() and abs(found.value - exact) < 3 * found.error


def products_for_all_sizes(accelerator: Accelerator | None = None) -> list[Tensor]:
    trace, state, gates, x, labels = case(Chain(), 29)
    found = []
    for count in (*range(1, 8), 16, 29):
        rows = list(zip(x[:count].split(1), labels[:count].split(1)))
        options = {"total": count}
        if accelerator is not None:
            options["workers"] = Workers(accelerator)
            with accelerator.split_between_processes(rows) as share:
                rows = share
        found.append(gate_curvature(GatedNetwork(trace, state), rows, "hessian", **options)(block(gates.size)))
    return found


def check_share_of_processes(rank: int, processes: int, port: int) -> None:
    torch.set_num_threads(1)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ.update(
        {name: str(value) for name, value in world.items()}, MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == processes
    for one, several in zip(products_for_all_sizes(), products_for_all_sizes(accelerator), strict=True):
        torch.testing.assert_close(several, one, rtol=1e-12, atol=1e-15)
    accelerator.end_training()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_products_of_one_for_any_number_of_rows(processes):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(check_share_of_processes, (processes, port), nprocs=processes)


def test_what_would_make_the_hessian_a_moving_target_is_refused():
    net, x, labels = small()
    batches = [(x, labels)]
    with pytest.raises(CurvatureError, match=r"'norm' in training mode .* net.eval\(\)"):
        network_curvature(net.train(), batches)
    net.eval()
    for layer in (nn.Dropout(0.1), DropPath(0.1)):
        with pytest.raises(CurvatureError, match="'1' in training mode"):
            network_curvature(nn.Sequential(net, layer.train()), batches)
        network_curvature(nn.Sequential(net, layer.eval()), batches)
    network_curvature(nn.Sequential(net, nn.Dropout(0.0).train()), batches)
    with pytest.raises(CurvatureError, match="the loader shuffles"):
        network_curvature(net, DataLoader(batches, shuffle=True))
    with pytest.raises(CurvatureError, match="no images"):
        network_curvature(net, [])
    with pytest.raises(CurvatureError, match="no weight 'fc'"):
        network_curvature(net, batches, names=["fc"])
    with pytest.raises(CurvatureError, match="bfloat16 are too coarse"):
        network_curvature(net.bfloat16(), batches)


def test_wrapped_networks_are_refused(tmp_path):
    net, x, labels = small()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        with pytest.raises(CurvatureError, match="wrapped in DistributedDataParallel"):
            network_curvature(wrapped, [(x, labels)])
    finally:
        torch.distributed.destroy_process_group()


def test_batches_of_a_loader_may_be_dictionaries():
    net, x, labels = small()
    loader = DataLoader([{"pixel_values": a, "labels": b} for a, b in zip(x, labels)], batch_size=3)
    found, space = network_curvature(net, loader)
    expected, _ = network_curvature(net, [(x, labels)])
    torch.testing.assert_close(found(block(space.size)), expected(block(space.size)), rtol=1e-11, atol=1e-13)


@pytest.mark.realdata
def test_the_top_eigenvalue_of_real_weights_is_that_of_pyhessian():
    """ResNet-56 and CIFAR-10: the same 32 images, theirs by power iteration, ours by Lanczos."""
    pyhessian = pytest.importorskip("pyhessian", reason='needs pip install "hf_camphive[benchmarks]"')
    folder = Path(__file__).parents[3] / "shared" / "data"
    weights = folder / "weights" / "cifar10_resnet56.safetensors"
    if not weights.exists():
        pytest.skip("the CIFAR-10 ResNet-56 and its images are not beside the project")
    base = load_base("cifar_resnet56", str(weights))
    batch = next(
        iter(load_loaders(str(folder / "cifar10"), base.net, CampHiVeConfig(calibration_size=32)).calibration)
    )
    images, labels = batch["pixel_values"], batch["labels"]
    net = base.net.eval()
    product, space = network_curvature(net, [(images, labels)])
    generator = torch.Generator().manual_seed(0)
    ours = lanczos(product, space.size, 1, SolverOptions(60, 1e-3, generator))
    theirs = pyhessian.hessian(net, nn.CrossEntropyLoss(), data=(images, labels), cuda=False)
    torch.manual_seed(0)
    (value,), _ = theirs.eigenvalues(maxIter=200, tol=1e-5)
    assert ours.converged, ours.verdict
    assert float(ours.values[0]) == pytest.approx(value, rel=0.01)
