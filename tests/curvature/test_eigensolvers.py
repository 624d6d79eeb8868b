"""Eigenpairs against spectra that are known, scipy's ARPACK, and the same iteration undisturbed."""

from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from support.spectra import seed, with_spectrum
from torch import Tensor

from hf_camphive.core.errors import CampHiVeError, CurvatureError
from hf_camphive.core.runtime import Workers
from hf_camphive.curvature.eigensolvers import (
    LARGEST_DENSE,
    Outcome,
    SolverOptions,
    SolverState,
    dense_matrix,
    eigenpairs_of,
    lanczos,
    power_iteration,
)


class Kept:
    """A checkpoint in memory: where an iteration starts, and all states that it kept."""

    def __init__(self, start: SolverState | None = None) -> None:
        self.start, self.states = start, []

    def load(self) -> SolverState | None:
        return self.start

    def save(self, state: SolverState) -> None:
        self.states.append({name: tensor.clone() for name, tensor in state.items()})


def solved(method, product, size, k, *, steps, tolerance, generator, dtype=torch.float64, checkpoint=None, **options):
    settings = SolverOptions(steps, tolerance, generator, dtype, checkpoint=checkpoint)
    return method(product, size, k, settings, **options)


power = partial(solved, power_iteration)
krylov = partial(solved, lanczos)
single = partial(solved, lanczos, block=1)
METHODS = {"power": power, "oversampled": partial(power, oversample=3), "lanczos": krylov, "single": single}
SPECTRA = {
    "positive": [5, 3, 1, 0.5, 0.1, 0],
    "negative dominant": [-5, 3, 1, 0.5, 0.1, 0],
    "all negative": [-5, -3, -1, -0.5, -0.1, -0.01],
    "degenerate": [4, 4, 1, 0.5, -0.2, 0],
    "degenerate behind": [5, 2, 2, -0.5, 0.1, 0],
    "signs": [4, -4, 1, 0.5, -0.2, 0],
    "identity": [1, 1, 1, 1, 1, 1],
    "rank one": [-3, 0, 0, 0, 0, 0],
    "tiny": [5e-30, 3e-30, 1e-30, 0, 0, 0],
}


def assert_eigenpairs(matrix: Tensor, found, expected, tolerance: float = 1e-8) -> None:
    """The pairs belong to the matrix, have these values, and state their true residuals."""
    scale = matrix.norm()
    assert found.converged and found.residuals.max() <= tolerance
    assert sorted(found.values.tolist()) == pytest.approx(sorted(expected), rel=1e-8, abs=1e-13 * float(scale))
    assert (found.values.abs().diff() <= 1e-9 * scale).all(), "largest |value| first"
    error = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert (error <= tolerance * found.values.abs() + 1e-13 * scale).all()
    identity = torch.eye(len(expected), dtype=torch.float64)
    torch.testing.assert_close(found.vectors.T @ found.vectors, identity, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 2, 3, 6, 9])
def test_known_spectra(method, name, k):
    values = SPECTRA[name]
    matrix = with_spectrum(values)
    tie = name == "signs" and k == 1
    copies = method == "single" and name.startswith("degenerate") and k in (2, 3)
    found = METHODS[method](lambda V: matrix @ V, 6, k, steps=400, tolerance=1e-8, generator=seed())
    if tie and method == "power":  # +4 and -4 take turns
        assert found.outcome is Outcome.STEPS
    elif tie:  # either will do
        assert_eigenpairs(matrix, found, [values[0] * float(found.values[0].sign())])
    elif copies:  # one vector at a time meets one direction of each eigenspace
        assert found.converged
    else:
        assert_eigenpairs(matrix, found, values[:k])


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_has_zero_eigenvalues(method):
    found = METHODS[method](torch.zeros_like, 4, 2, steps=9, tolerance=0.1, generator=seed())
    assert found.converged and found.values.tolist() == [0, 0] and found.residuals.tolist() == [0, 0]
    assert found.vectors.norm(dim=0).tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize("method", [power, krylov, single])
def test_agrees_with_arpack(method):
    """On an operator that is never a matrix: a tridiagonal one with a few strong rows."""
    size, k = 300, 4
    strong = torch.linspace(1, 2, size, dtype=torch.float64)
    strong[::60] = torch.tensor([9.0, -14.0, 11.0, -7.0, 20.0], dtype=torch.float64)

    def product(block: Tensor) -> Tensor:
        return strong[:, None] * block - torch.roll(block, 1, 0) - torch.roll(block, -1, 0)

    operator = LinearOperator(
        (size, size), matvec=lambda v: product(torch.from_numpy(v.reshape(-1, 1))).numpy()[:, 0], dtype=np.float64
    )
    values, vectors = eigsh(operator, k, which="LM", tol=1e-12)
    found = method(product, size, k, steps=500, tolerance=1e-9, generator=seed())
    assert found.converged
    order = np.argsort(-np.abs(values))
    np.testing.assert_allclose(found.values.numpy(), values[order], rtol=1e-10)
    overlaps = np.abs(np.sum(found.vectors.numpy() * vectors[:, order], axis=0))
    np.testing.assert_allclose(overlaps, 1, atol=1e-12)


def test_lanczos_and_oversampling_need_fewer_products():
    matrix = with_spectrum([0.9**i for i in range(200)])
    find = {"k": 8, "size": 200, "steps": 300, "tolerance": 1e-2}
    methods = {"power": power, "oversampled": partial(power, oversample=8), "lanczos": krylov, "single": single}
    found = {name: method(lambda V: matrix @ V, generator=seed(), **find) for name, method in methods.items()}
    assert all(result.converged for result in found.values())
    products = {name: result.products for name, result in found.items()}
    assert products["single"] < products["lanczos"] < products["oversampled"] / 1.5 < products["power"] / 2


@pytest.mark.parametrize("method", METHODS)
def test_products_are_counted(method):
    matrix, columns = with_spectrum([2.0**-i for i in range(12)]), []

    def product(block: Tensor) -> Tensor:
        columns.append(block.shape[1])
        return matrix @ block

    found = METHODS[method](product, 12, 2, steps=50, tolerance=1e-5, generator=seed())
    assert found.products == sum(columns) and found.steps == len(columns) - (found.method == "Lanczos")


@pytest.mark.parametrize("method", ["power", "lanczos", "single"])
def test_what_did_not_converge_says_so(method):
    matrix = with_spectrum(torch.linspace(0.9, 1, 60, dtype=torch.float64))
    find = METHODS[method]
    found = find(lambda V: matrix @ V, 60, 2, steps=3, tolerance=1e-8, generator=seed())
    error = (matrix @ found.vectors - found.vectors * found.values).norm(dim=0) / found.values.abs()
    torch.testing.assert_close(found.residuals, error, rtol=1e-6, atol=1e-12)
    assert not found.converged and found.steps == 3 and found.residuals.max() > 1e-8
    assert f"3 steps and {found.products} products" in found.verdict
    assert f"residual {error.max():.2g} (asked: 1e-08): allow more steps" in found.verdict


def test_rounding_is_told_from_slowness():
    matrix = with_spectrum([3, 2, 1] + [0.0] * 47).float()
    found = power_iteration(lambda V: matrix @ V, 50, 2, SolverOptions(40, 1e-9, seed()))
    assert found.outcome is Outcome.ROUNDING and "float64" in found.verdict


@pytest.mark.parametrize("method", METHODS)
def test_float32_reaches_a_useful_residual(method):
    matrix = with_spectrum([(-0.7) ** i for i in range(60)]).float()
    find = METHODS[method]
    found = find(lambda V: matrix @ V, 60, 3, steps=60, tolerance=1e-4, generator=seed(), dtype=torch.float32)
    assert found.converged and found.vectors.dtype == torch.float32
    np.testing.assert_allclose(found.values.numpy(), [1, -0.7, 0.49], rtol=1e-5)


def from_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As it comes back from disk, where strides are not kept."""
    return safetensors.torch.load(safetensors.torch.save({name: t.contiguous() for name, t in state.items()}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_iteration_ends_as_if_it_had_not_been_interrupted(method, stop):
    """Also through an invariant subspace, where Lanczos draws a random direction (rank 5)."""
    matrix = with_spectrum([5, -4, 3, 2.5, 2] + [0.0] * 195)
    find = partial(METHODS[method], lambda V: matrix @ V, 200, 3, steps=30, tolerance=1e-10)
    kept = Kept()
    whole = find(generator=seed(), checkpoint=kept)
    states = [from_file(state) for state in kept.states]
    assert len(states) == whole.steps - 1 or method == "oversampled"
    if method == "lanczos":
        assert not torch.equal(states[0]["generator"], states[-1]["generator"]), "no random direction was needed"
    start = states[min(stop, len(states)) - 1]
    again = Kept(start)
    resumed = find(generator=seed(7), checkpoint=again)  # the generator's state is part of the start
    assert torch.equal(resumed.values, whole.values) and torch.equal(resumed.vectors, whole.vectors)
    assert (resumed.steps, resumed.products, resumed.outcome) == (whole.steps, whole.products, whole.outcome)
    assert len(again.states) == len(states) - min(stop, len(states))


@pytest.mark.parametrize("method", METHODS)
def test_another_matrix_cannot_go_on(method):
    matrix, kept = with_spectrum([0.9**i for i in range(9)]), Kept()
    METHODS[method](lambda V: matrix @ V, 9, 2, steps=3, tolerance=1e-9, generator=seed(), checkpoint=kept)
    with pytest.raises(CurvatureError, match=r"block \[9, \d\] where this one has \[8, \d\].*start afresh"):
        METHODS[method](torch.clone, 8, 2, steps=3, tolerance=1e-9, generator=seed(), checkpoint=Kept(kept.states[0]))


def test_the_same_vectors_are_drawn_for_every_dtype():
    matrix, seen = with_spectrum([0.9**i for i in range(40)]), []

    def product(block: Tensor) -> Tensor:
        seen.append(block.double())
        return matrix.to(block) @ block

    for dtype in (torch.float32, torch.float64):
        power_iteration(product, 40, 2, SolverOptions(1, 0, seed(), dtype))
    torch.testing.assert_close(*seen, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_products_that_are_no_numbers_are_refused(method):
    calls = []

    def product(block: Tensor) -> Tensor:
        calls.append(1)
        return block * torch.arange(6.0)[:, None] if len(calls) < 2 else torch.full_like(block, float("nan"))

    with pytest.raises(CurvatureError, match=r"step 2: (\d+) of \1 entries of the product are NaN.*look for them"):
        METHODS[method](product, 6, 2, steps=9, tolerance=1e-12, generator=seed())


def test_what_cannot_work_is_refused():
    options = SolverOptions(5, 0.1, seed())
    with pytest.raises(CurvatureError, match=r"\[6, 2\] to one of the same shape, and gave \[6\]"):
        power_iteration(lambda V: V[:, 0], 6, 2, options)
    with pytest.raises(CampHiVeError, match="0 eigenpairs of a matrix with 6 rows"):
        power_iteration(torch.clone, 6, 0, options)
    with pytest.raises(CurvatureError, match="5 Lanczos steps of 1 vectors cannot give 6 eigenpairs; allow 6 steps"):
        lanczos(torch.clone, 9, 6, options, block=1)
    with pytest.raises(CurvatureError, match=rf"8,193 rows.*up to {LARGEST_DENSE:,} rows only; use lanczos"):
        dense_matrix(torch.clone, LARGEST_DENSE + 1)


def test_what_is_not_one_symmetric_matrix_is_noticed():
    skew = with_spectrum(SPECTRA["positive"])
    skew[0, 1:] += 3
    with pytest.raises(CurvatureError, match=r"differ by \d+%.*not those of one symmetric matrix"):
        dense_matrix(lambda V: skew @ V, 6, dtype=torch.float64)
    with pytest.raises(CurvatureError, match="look for dropout"):
        power(lambda V: skew @ V, 6, 3, steps=50, tolerance=1e-8, generator=seed())
    matrix, chance = with_spectrum([3.0**-i for i in range(20)]), seed(5)

    def noisy(block: Tensor) -> Tensor:  # a network with dropout
        return matrix @ block + 0.01 * torch.randn(block.shape, generator=chance, dtype=block.dtype)

    found = krylov(noisy, 20, 1, steps=20, tolerance=1e-3, generator=seed())
    assert found.outcome is Outcome.INCONSISTENT and "dropout" in found.verdict


@pytest.mark.parametrize(("block", "calls"), [(1, 6), (4, 2), (64, 1)])
def test_a_dense_matrix_takes_one_product_a_row(block, calls):
    matrix, widths = with_spectrum(SPECTRA["negative dominant"]), []
    found = dense_matrix(lambda V: widths.append(V.shape[1]) or matrix @ V, 6, block=block, dtype=torch.float64)
    torch.testing.assert_close(found, matrix, rtol=0, atol=1e-15)
    assert torch.equal(found, found.T) and len(widths) == calls and sum(widths) == 6


@pytest.mark.parametrize("name", SPECTRA)
def test_eigenpairs_of_a_matrix_at_hand(name):
    matrix = with_spectrum(SPECTRA[name])
    assert_eigenpairs(matrix, eigenpairs_of(matrix, 3), SPECTRA[name][:3])


def test_progress_shows_the_residual_and_is_silent_unless_asked(capsys):
    matrix = with_spectrum(SPECTRA["positive"])
    options = {"steps": 9, "tolerance": 1e-3, "generator": seed()}
    power(lambda V: matrix @ V, 6, 1, **options)
    assert capsys.readouterr() == ("", "")
    krylov(lambda V: matrix @ V, 6, 1, workers=Workers(shows=True), **options)
    shown = capsys.readouterr().err
    assert "Lanczos" in shown and "residual" in shown and "/9 [" in shown
