"""Stochastic traces against exact ones: unbiased, with errors that mean what they say."""

import pytest
import torch
from support.spectra import seed, with_spectrum
from torch import Tensor

from hf_camphive.core.errors import CurvatureError
from hf_camphive.core.runtime import Workers
from hf_camphive.curvature.estimators import SamplingOptions, Traces, hutch_plus_plus, hutchinson

SEGMENTS = torch.tensor([0, 0, 0, 1, 1, -1, 2, 2, 2, 2, -1, 1]).repeat_interleave(2)
DECAYING = with_spectrum([(-1) ** (i % 3) * 0.85**i for i in range(24)])
METHODS = {"hutchinson": hutchinson, "hutch++": hutch_plus_plus}


def estimated(method: str, matrix: Tensor, products: int, number: int = 0, **options) -> Traces:
    settings = SamplingOptions(seed(number), options.pop("block", 8), torch.float64)
    return METHODS[method](lambda V: matrix @ V, len(matrix), products, settings, **options)


def exact(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    diagonal = matrix.diagonal()
    return diagonal, torch.stack([diagonal[g == SEGMENTS].mean() for g in range(3)]), diagonal.sum()


@pytest.fixture(scope="module", params=METHODS)
def many(request) -> list[Traces]:
    return [estimated(request.param, DECAYING, 36, number, segments=SEGMENTS) for number in range(200)]


@pytest.mark.parametrize("part", range(3), ids=["diagonal", "segments", "trace"])
def test_estimates_are_unbiased_and_their_errors_calibrated(many, part):
    """Over 200 seeds: mean within 4 standard errors, z-scores spread by about 1, few beyond 3.

    Hutch++ has 12 samples here, and z-scores of so few spread by (11 / 9)^(1/2) = 1.1 even where they are normal.
    """
    truth = exact(DECAYING)[part]
    parts = [(found.diagonal, found.segments, found.trace)[part] for found in many]
    values, errors = torch.stack([p.value for p in parts]), torch.stack([p.error for p in parts])
    bias = (values.mean(0) - truth).abs() / (values.std(0) / len(many) ** 0.5)
    assert bias.max() < 4
    scores = (values - truth) / errors
    spread = scores.square().mean(0).sqrt()
    assert (spread > 0.8).all() and (spread < 1.35).all(), spread
    assert (scores.abs() < 3).double().mean() > 0.95


@pytest.mark.parametrize("method", METHODS)
def test_one_estimate_is_within_its_error_of_the_truth(method):
    generator = seed(3)
    factor = torch.randn(150, 150, generator=generator, dtype=torch.float64)
    matrix = factor @ factor.T / 150
    found = estimated(method, matrix, 90)
    assert (found.trace.value - matrix.trace()).abs() < 4 * found.trace.error < 0.2 * matrix.trace()
    assert found.products == 90 and found.segments.value.shape == (0,) and found.diagonal.value.shape == (150,)


def test_hutch_plus_plus_has_far_less_variance_where_eigenvalues_decay():
    matrix = with_spectrum([0.6**i for i in range(60)])
    spread = {
        method: torch.stack([estimated(method, matrix, 30, number).trace.value for number in range(40)]).std()
        for method in METHODS
    }
    assert spread["hutch++"] * 5 < spread["hutchinson"]


def test_hutch_plus_plus_is_exact_for_low_rank():
    matrix = with_spectrum([5, -3, 1, 0.1] + [0.0] * 36)
    found = estimated("hutch++", matrix, 15)
    torch.testing.assert_close(found.diagonal.value, matrix.diagonal(), rtol=0, atol=1e-13)
    torch.testing.assert_close(found.trace.value, matrix.trace(), rtol=0, atol=1e-13)
    assert found.trace.error < 1e-13 and found.diagonal.error.max() < 1e-13
    assert estimated("hutchinson", matrix, 15).trace.error > 0.1


def test_hutchinson_is_exact_for_a_diagonal():
    matrix = torch.diag(torch.tensor([3.0, -1.0, 0.5, 1e6], dtype=torch.float64))
    found = estimated("hutchinson", matrix, 3)
    assert torch.equal(found.diagonal.value, matrix.diagonal()) and found.diagonal.error.max() == 0
    assert found.trace.error == 0


@pytest.mark.parametrize("method", METHODS)
def test_blocks_do_not_matter_and_products_are_counted(method):
    widths: list[int] = []

    def product(block: Tensor) -> Tensor:
        widths.append(block.shape[1])
        return DECAYING @ block

    found = []
    for block in (1, 4, 64):
        widths.clear()
        settings = SamplingOptions(seed(), block, torch.float64)
        found.append(METHODS[method](product, 24, 13, settings, segments=SEGMENTS))
        assert sum(widths) == 13 == found[-1].products and max(widths) <= block
    for other in found[1:]:
        torch.testing.assert_close(other.diagonal.value, found[0].diagonal.value, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(other.segments.error, found[0].segments.error, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "products", "options", "message"),
    [
        ("hutchinson", 1, {}, "standard error needs at least 2 products, not 1"),
        ("hutch++", 5, {}, "5 are too few, give it at least 6"),
        ("hutchinson", 9, {"segments": SEGMENTS[:-1]}, r"each of the 24 entries.*a tensor \[23\]"),
        ("hutch++", 9, {"segments": SEGMENTS - 1}, r"numbers from -2"),
    ],
)
def test_what_cannot_work_is_refused(method, products, options, message):
    with pytest.raises(CurvatureError, match=message):
        estimated(method, DECAYING, products, **options)


@pytest.mark.parametrize(
    ("method", "where"), [("hutchinson", "Hutchinson, sample 1"), ("hutch++", r"Hutch\+\+, sketch")]
)
def test_products_that_are_no_numbers_are_refused(method, where):
    with pytest.raises(CurvatureError, match=rf"{where}: \d+ of 24 entries of the product are NaN or infinite"):
        estimated(method, DECAYING + torch.diag(torch.tensor([float("inf")] + [0.0] * 23)), 9, block=1)


def test_progress_is_silent_unless_asked(capsys):
    estimated("hutch++", DECAYING, 9)
    assert capsys.readouterr() == ("", "")
    estimated("hutch++", DECAYING, 9, workers=Workers(shows=True))
    assert "trace" in capsys.readouterr().err
