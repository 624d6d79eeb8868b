"""Estimate the diagonal and trace of a symmetric matrix A [n, n] from its products, with standard errors.

Means of the diagonal over segments, such as the weights of one channel, have their own standard errors, because the
entries of one sample are not independent. Products and random numbers are as in `eigensolvers.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_camphive.core.errors import CurvatureError
from hf_camphive.core.runtime import ALONE, Workers
from hf_camphive.curvature.eigensolvers import Product, checked, random_block, remainder


@dataclass(frozen=True)
class SamplingOptions:
    """Options for drawing random vectors and multiplying them: `block` vectors at once, in `dtype` on `device`.

    The samples depend on the generator alone, not on the block size.
    """

    generator: torch.Generator
    block: int = 8
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"


@dataclass(frozen=True)
class Estimate:
    """An unbiased estimate and its standard error, of the same shape."""

    value: Tensor
    error: Tensor


@dataclass(frozen=True)
class Traces:
    """Estimates of a diagonal [n], its mean over each segment [G] and its sum [], in float64 on the CPU.

    `products` is the number of matrix-vector products that they took.
    """

    diagonal: Estimate
    segments: Estimate
    trace: Estimate
    products: int


def hutchinson(
    product: Product,
    size: int,
    products: int,
    options: SamplingOptions,
    *,
    segments: Tensor | None = None,
    workers: Workers = ALONE,
) -> Traces:
    """Estimate diag(A) = E[z * A z] over random signs z (Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007).

    `segments` [n] holds the segment number of each entry, -1 for none. The standard errors are those of a mean of
    `products` independent samples.

    Raises:
        CurvatureError: There are fewer than 2 products, a product is not finite or does not have the shape of its
            argument, or `segments` has another shape than [n] or a number below -1.
    """
    summarise = _summary(size, segments)
    moments = _sampled(product, size, products, summarise, options, workers)
    return _traces(*moments, size, products)


def hutch_plus_plus(
    product: Product,
    size: int,
    products: int,
    options: SamplingOptions,
    *,
    segments: Tensor | None = None,
    workers: Workers = ALONE,
) -> Traces:
    """Estimate diag(A) and tr(A) by Hutch++: exactly within the range of a sketch, by `hutchinson` outside of it.

    tr(A) = tr(Q^T A Q) + tr((I - P) A (I - P)) with P = Q Q^T, Q = orth(A S) and S random (Meyer, Musco, Musco and
    Woodruff 2021, arXiv:2010.09649, algorithm 1). A third of `products` each goes to A S, A Q and samples of the second
    term. The diagonal follows Diag++ (Baston and Nakatsukasa 2022, arXiv:2201.10684):
    diag(A) = diag(P A) + diag((I - P) A P) + diag((I - P) A (I - P)).

    The variance is far lower than `hutchinson`'s where few eigenvalues dominate, and zero where rank(A) <= products / 3.
    The standard errors are those of the samples, for the given Q. Holds Q and A Q, [n, products / 3] each.

    Raises:
        CurvatureError: There are fewer than 6 products, a product is not finite or does not have the shape of its
            argument, or `segments` has another shape than [n] or a number below -1.
    """
    if products < 6:
        raise CurvatureError(
            f"Hutch++ divides its products into three parts; {products} are too few, give it at least 6"
        )
    summarise = _summary(size, segments)
    width = min(products // 3, size)
    sketch = random_block(size, width, options.generator, options.dtype, options.device)
    basis = torch.linalg.qr(_in_blocks(product, sketch, options.block, "Hutch++, sketch", workers)).Q
    image = _in_blocks(product, basis, options.block, "Hutch++, projection", workers)
    exact = (basis * (image + remainder(image, basis)[0])).cpu().double().sum(1)

    def complement(vectors: Tensor) -> Tensor:
        return remainder(product(remainder(vectors, basis)[0]), basis)[0]

    samples = products - 2 * width
    mean, error = _sampled(complement, size, samples, summarise, options, workers)
    return _traces(mean + summarise(exact), error, size, products)


def _sampled(
    product: Product,
    size: int,
    samples: int,
    summarise: Callable[[Tensor], Tensor],
    options: SamplingOptions,
    workers: Workers,
) -> tuple[Tensor, Tensor]:
    """Return the mean of summarise(z * A z) over random signs z, and its standard error.

    Raises:
        CurvatureError: There are fewer than 2 samples.
    """
    if samples < 2:
        raise CurvatureError(f"a standard error needs at least 2 products, not {samples}")
    drawn, mean, spread = 0, torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with workers.bar("Hutchinson", "product", samples) as bar:
        while drawn < samples:
            signs = _signs(size, min(options.block, samples - drawn), options.generator)
            image = checked(product, signs.to(options.dtype).to(options.device), f"Hutchinson, sample {drawn + 1}")
            for sample in (signs * image.cpu().double()).T:
                drawn += 1
                found = summarise(sample)
                change = found - mean  # Welford's recurrence avoids a difference of large sums
                mean = mean + change / drawn
                spread = spread + change * (found - mean)
            bar.update(signs.shape[1])
            bar.set_postfix_str(f"trace {mean[-1]:.3g}")
    return mean, (spread / (drawn - 1) / drawn).sqrt()


def _signs(size: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw random signs [size, columns] column by column, so that the block size does not change them."""
    drawn = [torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) for _ in range(columns)]
    return 2 * torch.stack(drawn, dim=1) - 1


def _summary(size: int, segments: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function that maps a diagonal [n] to [n + G + 1]: itself, its mean over each segment, and its sum.

    Raises:
        CurvatureError: `segments` has another shape than [n], or a number below -1.
    """
    labels = torch.full((size,), -1) if segments is None else segments.cpu()
    if labels.shape != (size,) or (labels < -1).any():
        raise CurvatureError(
            f"segments must hold one number for each of the {size} entries, -1 for no segment; got a tensor "
            f"{list(labels.shape)} with numbers from {labels.min()}"
        )
    sizes = torch.bincount(labels + 1)[1:].clamp_min(1)

    def summarise(diagonal: Tensor) -> Tensor:
        sums = torch.zeros(len(sizes) + 1, dtype=diagonal.dtype).index_add_(0, labels + 1, diagonal)
        return torch.cat([diagonal, sums[1:] / sizes, diagonal.sum()[None]])

    return summarise


def _traces(mean: Tensor, error: Tensor, size: int, products: int) -> Traces:
    """Split the mean and the standard error of a summary [n + G + 1] into the estimates of `Traces`."""
    diagonal, segments, trace = (Estimate(*both) for both in zip(_parts(mean, size), _parts(error, size)))
    return Traces(diagonal, segments, trace, products)


def _parts(summary: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a summary [n + G + 1] into the diagonal [n], the means over segments [G] and the sum []."""
    return summary[:size], summary[size:-1], summary[-1]


def _in_blocks(product: Product, vectors: Tensor, block: int, where: str, workers: Workers) -> Tensor:
    """Return A V for V [n, k], multiplying `block` columns at once; `where` names the product in errors."""
    images = []
    with workers.bar(where, "product", vectors.shape[1]) as bar:
        for part in vectors.split(block, dim=1):
            images.append(checked(product, part, where))
            bar.update(part.shape[1])
    return torch.cat(images, dim=1)
