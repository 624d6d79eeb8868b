"""Ridge regression from sums of products, accumulated over batches and processes and solved for each convolution group."""

import torch
from torch import Tensor

from hf_camphive.core.errors import ReconstructionError
from hf_camphive.core.runtime import ALONE, Workers, float64_device
from hf_camphive.pruning.tuning import RIDGE_FACTORS

LARGEST_RIDGE = 1e6  # relative to the mean diagonal, like all ridges; rounding errors need less than 1e-6


class NormalEquations:
    """Accumulate X^T X [groups, d, d] and X^T E [groups, d, C_out / groups] of one fit, in float64.

    X are the fit's rows and E the errors that the present weights leave. Some batches are held out of the fit, to choose
    the ridge on images that it has not seen. Rows are on `device`, sums on it or, where it has no float64, on the CPU
    (`float64_device`). `layer` names the fit in errors.
    """

    def __init__(
        self, groups: int, unknowns: int, outputs: int, device: torch.device | str = "cpu", layer: str = "a layer"
    ) -> None:
        shape = (2, groups, unknowns, unknowns + outputs)  # fitted and held out; X^T [X, E]
        device = float64_device(torch.device(device))
        self.products = torch.zeros(shape, dtype=torch.float64, device=device)
        self.rows = torch.zeros(2, dtype=torch.float64, device=device)
        self.layer = layer

    def add(self, rows: Tensor, errors: Tensor, held_out: bool) -> None:
        """Add rows [groups, n, d] and the errors that the present weights leave on them, [groups, n, C_out / groups]."""
        self.rows[int(held_out)] += rows.shape[1]
        for some, rest in zip(rows.split(8192, dim=1), errors.split(8192, dim=1)):  # float32 sums stay short
            self.products[int(held_out)] += (some.mT @ torch.cat([some, rest], dim=2)).to(self.products.device)

    def solve(self, ridge: float, workers: Workers = ALONE) -> tuple[Tensor, Tensor]:
        """Return the change of the weights [groups, C_out / groups, d - 1] and of the constant [groups, C_out / groups].

        For each convolution group, the ridge among `ridge` times `RIDGE_FACTORS` with the least squared error on held-out
        batches is chosen, and the weights are then fitted to all batches. Where no ridge lowers that error, nothing
        changes. Without held-out batches the ridge is `ridge`.

        Raises:
            ReconstructionError: The sums are not finite, or no ridge makes X^T X positive definite.
        """
        unknowns = self.products.shape[2]
        products = workers.sum(self.products)
        if not products.sum().isfinite():  # one entry that is not finite makes the sum so, and no copy is made
            raise ReconstructionError(
                f"the least-squares fit of {self.layer} has NaN or infinite sums; look for them in the calibration images, "
                "and in the weights of the layers up to this one"
            )
        grams, crosses = products.split([unknowns, products.shape[3] - unknowns], dim=3)
        candidates = [ridge * factor for factor in RIDGE_FACTORS] if workers.sum(self.rows).all() else []
        losses = []
        for value in candidates:
            change = _ridge_solution(grams[0], crosses[0], grams.new_full(grams.shape[1:2], value), self.layer)
            losses.append((change * (grams[1] @ change)).sum((1, 2)) - 2 * (change * crosses[1]).sum((1, 2)))
        if not candidates:
            solution = _ridge_solution(
                grams.sum(0), crosses.sum(0), grams.new_full(grams.shape[1:2], ridge), self.layer
            )
        else:
            best = torch.stack([*losses, torch.zeros_like(losses[0])]).argmin(dim=0)
            chosen = grams.new_tensor([*candidates, ridge])[best]
            solution = _ridge_solution(grams.sum(0), crosses.sum(0), chosen, self.layer)
            solution[best == len(candidates)] = 0
        return solution[:, :-1].mT, solution[:, -1]

    def restricted(self, unknowns: Tensor, outputs: Tensor) -> "NormalEquations":
        """Return the sums of a smaller fit without convolution groups: outputs [m] on unknowns [n] and the constant."""
        constant = self.products.shape[2] - 1
        kept = torch.cat([unknowns, unknowns.new_tensor([constant])]).to(self.products.device)
        columns = torch.cat([kept, constant + 1 + outputs.to(kept)])
        small = NormalEquations(1, len(kept), len(outputs), layer=self.layer)
        small.products, small.rows = self.products[:, :, kept][..., columns], self.rows
        return small


def _ridge_solution(gram: Tensor, cross: Tensor, ridge: Tensor, layer: str) -> Tensor:
    """Solve each group's ridge regression, (G + ridge * mean(diag G) I) W = cross; returns [groups, d, C_out / groups].

    `ridge` is [groups]. The constant, the last of the d unknowns, is not damped: rows are centred instead, in float64. A
    ridge too small for the rounding of the sums is raised tenfold until the matrix is positive definite.

    Raises:
        ReconstructionError: The matrix is not positive definite even with `LARGEST_RIDGE`.
    """
    count = gram[:, -1, -1].clamp_min(1e-300)[:, None, None]  # the count is 0 where no constant is fitted
    mean, total = gram[:, :-1, -1:] / count, cross[:, -1:]
    targets = cross[:, :-1] - mean @ total
    scale = gram.diagonal(dim1=-2, dim2=-1)[:, :-1].mean(dim=1).clamp_min(1e-12)
    while True:
        # Centred in one step: each copy of a d x d matrix may take hundreds of MB.
        damped = torch.baddbmm(gram[:, :-1, :-1], mean, mean.mT * count, alpha=-1)
        damped.diagonal(dim1=-2, dim2=-1).add_((ridge * scale)[:, None])
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            break
        if (ridge[failed > 0] > LARGEST_RIDGE).any():
            raise ReconstructionError(
                f"the least-squares fit of {layer} is not positive definite even with a ridge of {LARGEST_RIDGE:g} times its "
                "mean diagonal, which sums of products always are; look for activations too large for their precision, and on "
                "several processes for workers that do not sum"
            )
        ridge = torch.where(failed > 0, (10 * ridge).clamp_min(1e-12), ridge)
    weights = torch.cholesky_solve(targets, factor)
    return torch.cat([weights, (total - mean.mT @ weights * count) / count], dim=1)
