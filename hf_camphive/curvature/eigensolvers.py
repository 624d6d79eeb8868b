"""Compute top eigenpairs of a symmetric matrix A [n, n] that is given only by its products with blocks of vectors.

A `product` maps V [n, k] to A V [n, k]; for a matrix in memory it is `lambda V: A @ V`. `power_iteration` is the method
of CAMP-HiVe (arXiv:2511.06265), `lanczos` needs far fewer products, and `dense_matrix` needs one product for each row.
Random vectors are drawn in float64 from a CPU generator and then moved to `dtype` and `device`, so that every process
and device uses the same vectors. Small projected matrices are solved in float64 on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from hf_camphive.core.errors import CurvatureError
from hf_camphive.core.runtime import ALONE, Workers

Product = Callable[[Tensor], Tensor]
SolverState = dict[str, Tensor]  # what an iteration needs to be resumed, as tensors that safetensors can store
LARGEST_DENSE = 8192  # rows: the matrix takes 0.5 GiB in float64, and its eigenvalues take minutes
_ASYMMETRY = 0.1  # relative; far above the rounding of half precision, far below the effect of dropout


class SolverCheckpoint(Protocol):
    """Storage for the state of an iteration, so that an interrupted iteration can be resumed."""

    def load(self) -> SolverState | None:
        """Return the saved state, or None if there is none."""

    def save(self, state: SolverState) -> None:
        """Save a state in place of the previous one."""


@dataclass(frozen=True)
class SolverOptions:
    """Stopping rule, number format and checkpoint of an eigensolver.

    An eigensolver stops after `steps` steps, or once every residual ||A v - lambda v|| / |lambda| is at most `tolerance`.
    Random starts are drawn from `generator`; vectors are held in `dtype` on `device`. With a `checkpoint`, the state is
    saved after every step but the last, and the iteration starts from the state that the checkpoint holds.
    """

    steps: int
    tolerance: float
    generator: torch.Generator
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    checkpoint: SolverCheckpoint | None = None

    def resumed(self) -> SolverState | None:
        """Return the state that an interrupted iteration left, or None."""
        return None if self.checkpoint is None else self.checkpoint.load()

    def keep(self, state: SolverState) -> None:
        """Save a state, where there is a checkpoint."""
        if self.checkpoint is not None:
            self.checkpoint.save(state)


class Outcome(Enum):
    """How an iteration ended; the value says what to do about it."""

    CONVERGED = "every residual is within the tolerance"
    STEPS = "allow more steps or a larger tolerance; Lanczos needs fewer products than power iteration"
    ROUNDING = "the residual is at the level of rounding; allow a larger tolerance, or compute the products in float64"
    INCONSISTENT = (
        "the products are not those of one symmetric matrix, or too noisy for this tolerance; look for dropout, "
        "BatchNorm in training mode or images that change from product to product, or allow a larger tolerance"
    )


@dataclass(frozen=True)
class Eigenpairs:
    """Top eigenpairs, largest |value| first: `values` [k], orthonormal `vectors` [n, k].

    `residuals` [k] are the measured ||A v - lambda v|| / |lambda|, or 0 for an eigenvalue that is zero to rounding.
    `products` counts the vectors that were multiplied.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    method: str
    tolerance: float
    steps: int
    products: int
    outcome: Outcome

    @property
    def converged(self) -> bool:
        """Whether every residual is within the tolerance."""
        return self.outcome is Outcome.CONVERGED

    @property
    def verdict(self) -> str:
        """One sentence: how the iteration ended, and what to do about it."""
        return (
            f"{self.method} stopped after {self.steps} steps and {self.products} products at residual "
            f"{self.residuals.max():.2g} (asked: {self.tolerance:.2g}): {self.outcome.value}"
        )


def power_iteration(
    product: Product,
    size: int,
    k: int,
    options: SolverOptions,
    *,
    oversample: int = 0,
    workers: Workers = ALONE,
) -> Eigenpairs:
    """Find the top k eigenpairs by block power iteration with Rayleigh-Ritz: V <- Ritz vectors of A in span(A V).

    With k = 1 this is the method of CAMP-HiVe (arXiv:2511.06265). The iteration stops on the residual, because the scores
    use the vectors, and an eigenvalue converges long before its vector does. With `oversample` further vectors the rate
    of convergence is |lambda_(k + oversample + 1) / lambda_k|. An iteration that is resumed from its checkpoint gives the
    same result as one that was never interrupted.

    Raises:
        CurvatureError: k or `size` is below 1, the checkpoint is that of another matrix, or a product is not finite, does
            not have the shape of its argument, or is not that of a symmetric matrix.
    """
    steps, tolerance, dtype, device = options.steps, options.tolerance, options.dtype, options.device
    k = _at_most(k, size)
    width = min(k + oversample, size)
    if (start := options.resumed()) is not None:
        done, basis = int(start["steps"]), _checked_block(start["block"], size, width).to(dtype).to(device)
    else:
        done, basis = 0, _orthonormal(random_block(size, width, options.generator, dtype, device))
    with workers.bar("Power iteration", "step", steps, done) as bar:
        for step in count(done + 1):
            image = checked(product, basis, f"power iteration, step {step}")
            projected = _symmetric(basis.T @ image, image.norm(), f"power iteration, step {step}")
            values, mix = _top_eigenpairs(projected, width)
            mix = mix.to(basis)
            vectors, image = basis @ mix, image @ mix
            errors = (image - vectors * values.to(basis)).norm(dim=0).cpu().double()
            residuals, outcome = _residuals(errors[:k], values[:k], tolerance, _rounding(values, size, dtype))
            bar.update()
            bar.set_postfix_str(f"residual {residuals.max():.1e}")
            if outcome is Outcome.CONVERGED or step >= steps:
                break
            basis = _orthonormal(image)
            options.keep({"block": basis, "steps": torch.tensor(step)})
    found = (values[:k].to(basis), vectors[:, :k], residuals.to(basis))
    return Eigenpairs(*found, "power iteration", tolerance, step, step * width, outcome)


def lanczos(
    product: Product,
    size: int,
    k: int,
    options: SolverOptions,
    *,
    block: int | None = None,
    workers: Workers = ALONE,
) -> Eigenpairs:
    """Find the top k eigenpairs by block Lanczos with full reorthogonalisation, in blocks of `block` vectors (default k).

    Each step extends the orthonormal basis Q by A Q_last, orthogonalised twice against all of Q (Golub and Van Loan,
    Matrix Computations, section 10.3); the Ritz pairs are those of Q^T A Q. During the iteration the residuals are bounded
    by the norm of the part of A Q_last outside of span(Q); at the end they are measured with k further products. Where
    that part vanishes (an invariant subspace), Q is extended by a random direction instead. Eigenvalues of multiplicity
    up to `block` are found; a smaller block needs fewer products, and misses further copies of an eigenvalue.

    Holds Q [n, steps * block], which the state in the checkpoint includes.

    Raises:
        CurvatureError: k or `size` is below 1, the steps cannot give k eigenpairs, the checkpoint is that of another
            matrix, or a product is not finite, does not have the shape of its argument, or is not that of a symmetric
            matrix.
    """
    steps, tolerance = options.steps, options.tolerance
    k = _at_most(k, size)
    width = min(block or k, size)
    if steps * width < k:
        raise CurvatureError(
            f"{steps} Lanczos steps of {width} vectors cannot give {k} eigenpairs; allow {-(-k // width)} steps at least"
        )
    done, basis, projected = _lanczos_start(size, width, options)
    with workers.bar("Lanczos", "step", steps, done) as bar:
        for step in count(done + 1):
            newest = basis[:, len(projected) :]
            image = checked(product, newest, f"Lanczos, step {step}")
            rest, columns = remainder(image, basis)
            projected = _bordered(projected, columns.cpu().double())
            values, mix = _top_eigenpairs(projected, k)
            errors = (rest @ mix[-newest.shape[1] :].to(rest)).norm(dim=0).cpu().double()
            rounding = _rounding(values, size, options.dtype)
            bounds, outcome = _residuals(errors, values, 0.9 * tolerance, rounding)  # leaves room for rounding
            bar.update()
            bar.set_postfix_str(f"residual {bounds.max():.1e}")
            enough = len(values) == k and outcome is Outcome.CONVERGED
            if enough or step >= steps or basis.shape[1] == size:
                break
            basis = torch.cat([basis, _next_block(rest, basis, rounding, options.generator)], dim=1).contiguous()
            state = {"basis": basis, "projected": projected, "steps": torch.tensor(step)}
            options.keep(state | {"generator": options.generator.get_state()})
    vectors = basis @ mix.to(basis)
    errors = (checked(product, vectors, "Lanczos, residuals") - vectors * values.to(basis)).norm(dim=0).cpu().double()
    residuals, measured = _residuals(errors, values, tolerance, rounding)
    if outcome is Outcome.CONVERGED and measured is Outcome.STEPS:
        measured = Outcome.INCONSISTENT
    products = len(projected) + k
    return Eigenpairs(values.to(basis), vectors, residuals.to(basis), "Lanczos", tolerance, step, products, measured)


def _lanczos_start(size: int, width: int, options: SolverOptions) -> tuple[int, Tensor, Tensor]:
    """Return the steps done, the basis Q [n, m] and Q^T A Q, from the checkpoint or for a new iteration.

    Raises:
        CurvatureError: The checkpoint is that of another matrix.
    """
    if (start := options.resumed()) is not None:
        options.generator.set_state(start["generator"])
        basis = _checked_block(start["basis"], size).to(options.dtype).to(options.device)
        return int(start["steps"]), basis, start["projected"]
    block = random_block(size, width, options.generator, options.dtype, options.device)
    return 0, _orthonormal(block), torch.zeros(0, 0, dtype=torch.float64)


def dense_matrix(
    product: Product,
    size: int,
    *,
    block: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: Workers = ALONE,
) -> Tensor:
    """Compute the matrix A [n, n] from n = `size` products in ceil(n / block) blocks; return (A + A^T) / 2.

    Raises:
        CurvatureError: There are more than `LARGEST_DENSE` rows, or a product is not finite, does not have the shape of
            its argument, or is not that of a symmetric matrix.
    """
    if size > LARGEST_DENSE:
        raise CurvatureError(
            f"a matrix of {size:,} rows takes {size:,} products and {size**2 * dtype.itemsize / 2**30:,.1f} GiB, and is "
            f"computed up to {LARGEST_DENSE:,} rows only; use lanczos or power_iteration for its top eigenpairs"
        )
    matrix = torch.empty(size, size, dtype=dtype, device=device)
    with workers.bar("Matrix", "product", size) as bar:
        for first in range(0, size, block):
            chosen = range(first, min(first + block, size))
            unit = torch.zeros(size, len(chosen), dtype=dtype, device=device)
            unit[chosen, range(len(chosen))] = 1
            matrix[:, first : chosen.stop] = checked(product, unit, f"matrix, columns {first} to {chosen.stop - 1}")
            bar.update(len(chosen))
    return _symmetric(matrix, matrix.norm(), "matrix")


def eigenpairs_of(matrix: Tensor, k: int) -> Eigenpairs:
    """Return the top k eigenpairs of a symmetric matrix [n, n] in memory, exact to rounding.

    Raises:
        CurvatureError: k is below 1, or the matrix has no rows.
    """
    k = _at_most(k, len(matrix))
    values, vectors = _top_eigenpairs(matrix, k)
    errors = (matrix.cpu().double() @ vectors - vectors * values).norm(dim=0)
    tolerance = len(matrix) * torch.finfo(torch.float64).eps
    residuals, _ = _residuals(errors, values, tolerance, _rounding(values, len(matrix), torch.float64))
    found = (values.to(matrix), vectors.to(matrix), residuals.to(matrix))
    return Eigenpairs(*found, "dense solver", tolerance, 1, 0, Outcome.CONVERGED)


def checked(product: Product, block: Tensor, where: str) -> Tensor:
    """Return A V for a block V [n, k]; `where` names the product in errors.

    Raises:
        CurvatureError: A V does not have the shape of V, or is not finite.
    """
    image = product(block)
    if image.shape != block.shape:
        raise CurvatureError(
            f"{where}: a product must map a block {list(block.shape)} to one of the same shape, and gave "
            f"{list(image.shape)}; for a function of one vector, stack its products with the columns"
        )
    bad = image.numel() - int(image.isfinite().sum())
    if bad:
        raise CurvatureError(
            f"{where}: {bad:,} of {image.numel():,} entries of the product are NaN or infinite; look for them in the "
            "network's weights and the calibration images, or compute in float32 instead of a shorter type"
        )
    return image


def random_block(
    size: int, columns: int, generator: torch.Generator, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Draw standard normal numbers [size, columns], the same for every dtype and device up to rounding."""
    return torch.randn(size, columns, generator=generator, dtype=torch.float64).to(dtype).to(device)


def remainder(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return (I - Q Q^T) V and Q^T V for V [n, k] and an orthonormal basis Q [n, m].

    The projection is done twice, because rounding in the first pass leaves components along Q.
    """
    within = basis.T @ block
    block = block - basis @ within
    again = basis.T @ block
    return block - basis @ again, within + again


def _at_most(k: int, size: int) -> int:
    """Return min(k, size), the number of eigenpairs to find.

    Raises:
        CurvatureError: k or `size` is below 1.
    """
    if k < 1 or size < 1:
        raise CurvatureError(f"cannot find {k} eigenpairs of a matrix with {size} rows; both must be at least 1")
    return min(k, size)


def _checked_block(block: Tensor, size: int, width: int | None = None) -> Tensor:
    """Return the block of vectors of a checkpoint, after checking that its shape is [size, width].

    Raises:
        CurvatureError: The block has another shape.
    """
    width = width or block.shape[1]
    if block.shape != (size, width):
        raise CurvatureError(
            f"the checkpoint holds a block {list(block.shape)} where this one has {[size, width]}: it was saved for "
            "another matrix; delete it and start afresh"
        )
    return block


def _orthonormal(block: Tensor) -> Tensor:
    """Return an orthonormal basis of a block's span, contiguous.

    The memory layout is that of a tensor read from a checkpoint, so that products round alike after a resumption.
    """
    return torch.linalg.qr(block).Q.contiguous()


def _symmetric(matrix: Tensor, scale: Tensor, where: str) -> Tensor:
    """Return (M + M^T) / 2; `where` names the matrix in errors.

    Raises:
        CurvatureError: ||M - M^T|| exceeds `_ASYMMETRY` * `scale`, far more than rounding explains.
    """
    difference = (matrix - matrix.T).norm()
    if difference > _ASYMMETRY * scale:
        raise CurvatureError(
            f"{where}: <u, A v> and <v, A u> differ by {difference / scale:.0%} of A's size: {Outcome.INCONSISTENT.value}"
        )
    return (matrix + matrix.T) / 2


def _top_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the top k eigenpairs of a small symmetric matrix, largest |value| first, in float64 on the CPU."""
    values, vectors = torch.linalg.eigh(matrix.cpu().double())
    order = values.abs().argsort(descending=True, stable=True)[:k]
    return values[order], vectors[:, order]


def _rounding(values: Tensor, size: int, dtype: torch.dtype) -> float:
    """Return a bound on the rounding error in ||A v - lambda v||, from the largest |value|."""
    return float(4 * torch.finfo(dtype).eps * size**0.5 * values.abs().max())


def _residuals(errors: Tensor, values: Tensor, tolerance: float, rounding: float) -> tuple[Tensor, Outcome]:
    """Return the residuals ||A v - lambda v|| / |lambda| from `errors`, their numerators, and the outcome they imply.

    An eigenvalue that is zero to rounding has no relative residual; its residual is set to 0 if its numerator is at most
    `rounding` too.
    """
    zero = (values.abs() <= rounding) & (errors <= rounding)
    residuals = torch.where(zero, 0, errors / values.abs().clamp_min(torch.finfo(torch.float64).tiny))
    open_ = residuals > tolerance
    if not open_.any():
        return residuals, Outcome.CONVERGED
    return residuals, Outcome.ROUNDING if (errors[open_] <= rounding).all() else Outcome.STEPS


def _bordered(projected: Tensor, columns: Tensor) -> Tensor:
    """Return the symmetric matrix Q^T A Q [m, m] from its leading block [m - b, m - b] and its last columns [m, b]."""
    size, old = len(columns), len(projected)
    bordered = torch.zeros(size, size, dtype=projected.dtype)
    bordered[:old, :old] = projected
    bordered[:, old:] = columns
    bordered[old:, :old] = columns[:old].T
    bordered[old:, old:] = (columns[old:] + columns[old:].T) / 2
    return bordered


def _next_block(rest: Tensor, basis: Tensor, rounding: float, generator: torch.Generator) -> Tensor:
    """Return an orthonormal basis of `rest`, the part of A Q_last outside of span(Q).

    A column that is zero to rounding is replaced by a random direction.
    """
    block = basis[:, :0]
    for column in rest.T[: basis.shape[0] - basis.shape[1]]:
        column = remainder(column[:, None], block)[0]
        if column.norm() <= rounding:
            column = random_block(len(column), 1, generator, basis.dtype, basis.device)
        column = remainder(remainder(column / column.norm(), basis)[0], block)[0]
        block = torch.cat([block, column / column.norm()], dim=1)
    return block
