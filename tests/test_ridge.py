"""Ridge regression from sums against least squares on the rows themselves, and the choice of the ridge."""

import pytest
import torch

from hf_camphive.ridge import Sums


@pytest.mark.parametrize("groups", [1, 3])
def test_sums_of_batches_are_solved_like_all_rows_at_once(groups):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(groups, 40, 6, generator=generator, dtype=torch.float64) + 2
    errors = torch.randn(groups, 40, 2, generator=generator, dtype=torch.float64)
    rows[..., -1] = 1
    sums = Sums(groups, 6, 2)
    for some, rest in zip(rows.split(7, dim=1), errors.split(7, dim=1)):
        sums.add(some, rest, held_out=False)
    change, constant = sums.solve(0.0, lambda tensor: tensor)
    expected = torch.linalg.lstsq(rows, errors).solution
    torch.testing.assert_close(change, expected[:, :-1].mT)
    torch.testing.assert_close(constant, expected[:, -1])
    both, _ = sums.solve(0.0, lambda tensor: 2 * tensor)  # two processes with the same rows
    torch.testing.assert_close(both, change)


def test_a_ridge_shrinks_the_weights_and_not_the_constant():
    """Rows x = -1, 1 with errors 3, 5: slope 1 and mean 4; the ridge is a share of x's mean square over all rows, 2 here."""
    sums = Sums(1, 2, 1)
    sums.add(torch.tensor([[[-1.0, 1.0], [1.0, 1.0]]]), torch.tensor([[[3.0], [5.0]]]), held_out=False)
    change, constant = sums.solve(1.0, lambda tensor: tensor)
    assert change.item() == pytest.approx(0.5) and constant.item() == pytest.approx(4.0)  # 2 / (2 + 1 * 2)


def test_the_ridge_is_chosen_on_batches_that_the_fit_has_not_seen():
    """Rows that say nothing about each other: fitting them must not change the weights; real relations must."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    for relation in (0.0, 1.0):
        sums = Sums(1, 31, 4)
        for number in range(8):
            rows = torch.randn(1, 12, 31, generator=generator, dtype=torch.float64)
            rows[..., -1] = 1
            errors = relation * rows[..., :30] @ truth + torch.randn(
                1, 12, 4, generator=generator, dtype=torch.float64
            )
            sums.add(rows, errors, held_out=number % 4 == 3)
        change, _ = sums.solve(1e-4, lambda tensor: tensor)
        error = (change[0].T - relation * truth).norm() / truth.norm()
        assert error < (0.2 if relation == 0 else 0.6)
        without = Sums(1, 31, 4)
        without.products[0], without.rows[0] = sums.products[0], sums.rows[0]
        assert error < (without.solve(1e-4, lambda tensor: tensor)[0][0].T - relation * truth).norm() / truth.norm()
