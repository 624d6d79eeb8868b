"""Top eigenpairs of a symmetric matrix A [n, n] that is known only by its products with blocks of vectors.

Pure linear algebra: a `product` maps V [n, k] to A V [n, k], so that `lambda V: A @ V` is one. `power_iteration` is
CAMP-HiVe's way, `lanczos` needs far fewer products, `dense_matrix` takes one for each row. What is drawn at random comes
in float64 from a CPU generator and only then goes to `dtype` and `device`, so that every process and device sees the same
vectors; small projected matrices are solved in float64 on the CPU.
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
SolverState = dict[str, Tensor]  # where an iteration stands, as tensors that safetensors can hold
LARGEST_DENSE = 8192  # rows: 0.5 GiB in float64, and minutes for its eigenvalues
_ASYMMETRY = 0.1  # far above the rounding of half precision, far below what dropout does


class SolverCheckpoint(Protocol):
    """Where the state of an iteration is kept, so that an interrupted one can go on."""

    def load(self) -> SolverState | None: ...

    def save(self, state: SolverState) -> None: ...


@dataclass(frozen=True)
class SolverOptions:
    """How far an eigensolver iterates, and in which numbers.

    It stops after `steps` steps, or once every residual ||A v - lambda v|| / |lambda| is at most `tolerance`. Random
    starts are drawn from `generator`; vectors are held in `dtype` on `device`. With a `checkpoint` the state is saved
    after each step that another one follows, and the iteration starts from what the checkpoint holds.
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
    """How an iteration ended, with its remedy."""

    CONVERGED = "every residual is within the tolerance"
    STEPS = "allow more steps or a larger tolerance; Lanczos needs fewer products than power iteration"
    ROUNDING = "what is left is rounding; allow a larger tolerance, or compute the products in float64"
    INCONSISTENT = (
        "the products are not those of one symmetric matrix, or too noisy for this tolerance; look for dropout, "
        "BatchNorm in training mode or images that change from product to product, or allow a larger tolerance"
    )


@dataclass(frozen=True)
class Eigenpairs:
    """Top eigenpairs, largest |value| first: values [k], orthonormal vectors [n, k].

    `residuals` [k] are ||A v - lambda v|| / |lambda|, measured; 0 for an eigenvalue that is zero to rounding.
    `products` counts vectors multiplied.
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
        return self.outcome is Outcome.CONVERGED

    @property
    def verdict(self) -> str:
        """What happened, and what to do about it."""
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
    """Find the top k eigenpairs by block power iteration with Rayleigh-Ritz: V <- eigenvectors of A in span(A V).

    CAMP-HiVe (arXiv:2511.06265) with k = 1. The iteration stops on the residual: the scores use the vectors, and an
    eigenvalue settles long before its vector does. `oversample` further vectors make it converge at the rate
    |lambda_(k + oversample + 1) / lambda_k|. An iteration resumed from its checkpoint ends as if it had never stopped.

    Raises:
        CurvatureError: A product is not finite, has another shape, or is not that of a symmetric matrix.
    """
    steps, tolerance, dtype, device = options.steps, options.tolerance, options.dtype, options.device
    k = _at_most(k, size)
    width = min(k + oversample, size)
    if (start := options.resumed()) is not None:
        done, basis = int(start["steps"]), _kept(start["block"], size, width).to(dtype).to(device)
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
            residuals, outcome = _judge(errors[:k], values[:k], tolerance, _rounding(values, size, dtype))
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
    """Find the top k eigenpairs by block Lanczos with full reorthogonalisation, in blocks of k vectors or of `block`.

    Q grows by A Q_last, orthogonalised twice against all of Q (Golub and Van Loan, Matrix Computations, section 10.3);
    Ritz pairs are those of Q^T A Q. Each step bounds the residuals by the norm of what A Q_last adds beyond Q; at the end
    they are measured by k further products. Where nothing is added (an invariant subspace), a fresh random direction is.
    Eigenvalues of multiplicity up to `block` are found; smaller blocks need fewer products and miss copies beyond that.

    Holds Q [n, steps * block], which the checkpoint's state includes.

    Raises:
        CurvatureError: The steps cannot give k eigenpairs, or a product is not finite, has another shape, or is not that
            of a symmetric matrix.
    """
    steps, tolerance, dtype, device = options.steps, options.tolerance, options.dtype, options.device
    k = _at_most(k, size)
    width = min(block or k, size)
    if steps * width < k:
        raise CurvatureError(
            f"{steps} Lanczos steps of {width} vectors cannot give {k} eigenpairs; allow {-(-k // width)} steps at least"
        )
    if (start := options.resumed()) is not None:
        done, projected = int(start["steps"]), start["projected"]
        basis = _kept(start["basis"], size).to(dtype).to(device)
        options.generator.set_state(start["generator"])
    else:
        done, projected = 0, torch.zeros(0, 0, dtype=torch.float64)
        basis = _orthonormal(random_block(size, width, options.generator, dtype, device))
    with workers.bar("Lanczos", "step", steps, done) as bar:
        for step in count(done + 1):
            newest = basis[:, len(projected) :]
            image = checked(product, newest, f"Lanczos, step {step}")
            rest, columns = remainder(image, basis)
            projected = _bordered(projected, columns.cpu().double())
            values, mix = _top_eigenpairs(projected, k)
            errors = (rest @ mix[-newest.shape[1] :].to(rest)).norm(dim=0).cpu().double()
            rounding = _rounding(values, size, dtype)
            bounds, outcome = _judge(errors, values, 0.9 * tolerance, rounding)  # so that rounding does not decide
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
    residuals, measured = _judge(errors, values, tolerance, rounding)
    if outcome is Outcome.CONVERGED and measured is Outcome.STEPS:
        measured = Outcome.INCONSISTENT
    products = len(projected) + k
    return Eigenpairs(values.to(basis), vectors, residuals.to(basis), "Lanczos", tolerance, step, products, measured)


def dense_matrix(
    product: Product,
    size: int,
    *,
    block: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    workers: Workers = ALONE,
) -> Tensor:
    """Compute A itself [n, n] from `size` products in ceil(n / block) blocks, as (A + A^T) / 2.

    Raises:
        CurvatureError: There are more than `LARGEST_DENSE` rows, or a product is not finite, has another shape, or is not
            that of a symmetric matrix.
    """
    if size > LARGEST_DENSE:
        raise CurvatureError(
            f"a matrix of {size:,} rows takes {size:,} products and {size**2 * dtype.itemsize / 2**30:,.1f} GiB, and is "
            f"worked out up to {LARGEST_DENSE:,} rows only; use lanczos or power_iteration for its top eigenpairs"
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
    """Top k eigenpairs of a symmetric matrix [n, n] that is at hand, to rounding; costs no product."""
    k = _at_most(k, len(matrix))
    values, vectors = _top_eigenpairs(matrix, k)
    errors = (matrix.cpu().double() @ vectors - vectors * values).norm(dim=0)
    tolerance = len(matrix) * torch.finfo(torch.float64).eps
    residuals, _ = _judge(errors, values, tolerance, _rounding(values, len(matrix), torch.float64))
    found = (values.to(matrix), vectors.to(matrix), residuals.to(matrix))
    return Eigenpairs(*found, "dense solver", tolerance, 1, 0, Outcome.CONVERGED)


def checked(product: Product, block: Tensor, where: str) -> Tensor:
    """A V. Raises `CurvatureError` unless it has the shape of V and is all finite; `where` says which product it is."""
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
    """Standard normal numbers [size, columns], the same for every dtype and device."""
    return torch.randn(size, columns, generator=generator, dtype=torch.float64).to(dtype).to(device)


def remainder(block: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """(I - Q Q^T) V and Q^T V for an orthonormal basis Q; twice, since once leaves what rounding adds along Q."""
    within = basis.T @ block
    block = block - basis @ within
    again = basis.T @ block
    return block - basis @ again, within + again


def _at_most(k: int, size: int) -> int:
    if k < 1 or size < 1:
        raise CurvatureError(f"cannot find {k} eigenpairs of a matrix with {size} rows; both must be at least 1")
    return min(k, size)


def _kept(block: Tensor, size: int, width: int | None = None) -> Tensor:
    """A block that an interrupted iteration left, where it fits this one."""
    width = width or block.shape[1]
    if block.shape != (size, width):
        raise CurvatureError(
            f"the kept iteration has a block {list(block.shape)} where this one has {[size, width]}: it was that of "
            "another matrix; start afresh without it"
        )
    return block


def _orthonormal(block: Tensor) -> Tensor:
    """An orthonormal basis of a block's span, laid out as it is read from a file: products round alike after a resumption."""
    return torch.linalg.qr(block).Q.contiguous()


def _symmetric(matrix: Tensor, scale: Tensor, where: str) -> Tensor:
    """(M + M^T) / 2. Raises `CurvatureError` where M is not symmetric by far more than rounding of something of size `scale`."""
    difference = (matrix - matrix.T).norm()
    if difference > _ASYMMETRY * scale:
        raise CurvatureError(
            f"{where}: <u, A v> and <v, A u> differ by {difference / scale:.0%} of A's size: {Outcome.INCONSISTENT.value}"
        )
    return (matrix + matrix.T) / 2


def _top_eigenpairs(matrix: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Eigenpairs of a small symmetric matrix, largest |value| first, in float64 on the CPU."""
    values, vectors = torch.linalg.eigh(matrix.cpu().double())
    order = values.abs().argsort(descending=True, stable=True)[:k]
    return values[order], vectors[:, order]


def _rounding(values: Tensor, size: int, dtype: torch.dtype) -> float:
    """What rounding may leave of ||A v - lambda v||, by the largest |value|."""
    return float(4 * torch.finfo(dtype).eps * size**0.5 * values.abs().max())


def _judge(errors: Tensor, values: Tensor, tolerance: float, rounding: float) -> tuple[Tensor, Outcome]:
    """Residuals ||A v - lambda v|| / |lambda| from the numerators, and what they say.

    An eigenvalue that is zero to rounding has no relative residual; where its numerator is rounding too, it is called 0.
    """
    zero = (values.abs() <= rounding) & (errors <= rounding)
    residuals = torch.where(zero, 0, errors / values.abs().clamp_min(torch.finfo(torch.float64).tiny))
    open_ = residuals > tolerance
    if not open_.any():
        return residuals, Outcome.CONVERGED
    return residuals, Outcome.ROUNDING if (errors[open_] <= rounding).all() else Outcome.STEPS


def _bordered(projected: Tensor, columns: Tensor) -> Tensor:
    """Q^T A Q [m, m] from its leading block and its last columns [m, b]."""
    size, old = len(columns), len(projected)
    bordered = torch.zeros(size, size, dtype=projected.dtype)
    bordered[:old, :old] = projected
    bordered[:, old:] = columns
    bordered[old:, :old] = columns[:old].T
    bordered[old:, old:] = (columns[old:] + columns[old:].T) / 2
    return bordered


def _next_block(rest: Tensor, basis: Tensor, rounding: float, generator: torch.Generator) -> Tensor:
    """An orthonormal basis of what A Q_last adds to Q; a random direction takes the place of each that adds nothing."""
    block = basis[:, :0]
    for column in rest.T[: basis.shape[0] - basis.shape[1]]:
        column = remainder(column[:, None], block)[0]
        if column.norm() <= rounding:
            column = random_block(len(column), 1, generator, basis.dtype, basis.device)
        column = remainder(remainder(column / column.norm(), basis)[0], block)[0]
        block = torch.cat([block, column / column.norm()], dim=1)
    return block
