"""Ridge regression from sums against least squares on the rows themselves, and the choice of the ridge."""

import pytest
import torch
from support.workers import Summing

from hf_camphive.core.errors import ReconstructionError
from hf_camphive.pruning.merging.ridge import NormalEquations


@pytest.mark.parametrize("groups", [1, 3])
def test_sums_of_batches_are_solved_like_all_rows_at_once(groups):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(groups, 40, 6, generator=generator, dtype=torch.float64) + 2
    errors = torch.randn(groups, 40, 2, generator=generator, dtype=torch.float64)
    rows[..., -1] = 1
    sums = NormalEquations(groups, 6, 2)
    for some, rest in zip(rows.split(7, dim=1), errors.split(7, dim=1)):
        sums.add(some, rest, held_out=False)
    change, constant = sums.solve(0.0)
    expected = torch.linalg.lstsq(rows, errors).solution
    torch.testing.assert_close(change, expected[:, :-1].mT)
    torch.testing.assert_close(constant, expected[:, -1])
    both, _ = sums.solve(0.0, Summing(lambda tensor: 2 * tensor))  # two processes with the same rows
    torch.testing.assert_close(both, change)


def test_a_ridge_shrinks_the_weights_and_not_the_constant():
    """Rows x = -1, 1 with errors 3, 5: slope 1 and mean 4; the ridge is a share of x's mean square over all rows, 2 here."""
    sums = NormalEquations(1, 2, 1)
    sums.add(torch.tensor([[[-1.0, 1.0], [1.0, 1.0]]]), torch.tensor([[[3.0], [5.0]]]), held_out=False)
    change, constant = sums.solve(1.0)
    assert change.item() == pytest.approx(0.5) and constant.item() == pytest.approx(4.0)  # 2 / (2 + 1 * 2)


def test_the_ridge_is_chosen_on_batches_that_the_fit_has_not_seen():
    """Rows that say nothing about each other: fitting them must not change the weights; real relations must."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    for relation in (0.0, 1.0):
        sums = NormalEquations(1, 31, 4)
        for number in range(8):
            rows = torch.randn(1, 12, 31, generator=generator, dtype=torch.float64)
            rows[..., -1] = 1
            errors = relation * rows[..., :30] @ truth + torch.randn(
                1, 12, 4, generator=generator, dtype=torch.float64
            )
            sums.add(rows, errors, held_out=number % 4 == 3)
        change, _ = sums.solve(1e-4)
        error = (change[0].T - relation * truth).norm() / truth.norm()
        assert error < (0.2 if relation == 0 else 0.6)
        without = NormalEquations(1, 31, 4)
        without.products[0], without.rows[0] = sums.products[0], sums.rows[0]
        assert error < (without.solve(1e-4)[0][0].T - relation * truth).norm() / truth.norm()


def small_sums(layer: str = "stages.1.conv2") -> NormalEquations:
    sums = NormalEquations(1, 3, 2, layer=layer)
    rows = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums.add(rows, rows[..., :2], held_out=False)
    return sums


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("of_errors", [False, True])
def test_rows_that_are_not_numbers_are_refused_by_the_name_of_the_layer(value, held_out, of_errors):
    sums = small_sums()
    rows, errors = torch.ones(1, 4, 3), torch.ones(1, 4, 2)
    (errors if of_errors else rows)[0, 2, 1] = value
    sums.add(rows, errors, held_out)
    with pytest.raises(ReconstructionError, match=r"stages\.1\.conv2.*NaN or infinite.*images.*weights"):
        sums.solve(1e-4)
    with pytest.raises(ReconstructionError, match=r"stages\.1\.conv2"):
        sums.restricted(torch.arange(2), torch.arange(2)).solve(1e-4)


def test_finite_sums_that_no_ridge_makes_positive_definite_end_too():
    """X^T X is never negative: what is so comes from a `reduce` that does not sum, and not from rounding."""
    sums = small_sums()
    with pytest.raises(ReconstructionError, match=r"stages\.1\.conv2.*not positive definite"):
        sums.solve(1e-4, Summing(lambda tensor: -tensor))


def test_a_ridge_below_rounding_is_still_raised_as_far_as_needed():
    """Two equal columns and no ridge: the Gram matrix is singular, and the fit is that of one column shared out."""
    rows = torch.tensor([[[1.0, 1.0, 1.0], [2.0, 2.0, 1.0], [4.0, 4.0, 1.0]]], dtype=torch.float64)
    sums = NormalEquations(1, 3, 1)
    sums.add(rows, 3 * rows[..., :1] + 1, held_out=False)
    change, constant = sums.solve(0.0)
    torch.testing.assert_close(change.sum(2).item(), 3.0, rtol=1e-5, atol=0)
    torch.testing.assert_close(constant.item(), 1.0, rtol=1e-4, atol=0)
