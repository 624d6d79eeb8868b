"""Diagonal and trace of a symmetric matrix A [n, n] that is known only by its products, each with its standard error.

Means of the diagonal over segments, such as the weights of a channel, come with errors of their own: entries of one sample
are not independent. Products and random numbers are as in `eigensolvers.py`.
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
    """How random vectors are drawn and multiplied: `block` of them at once, in `dtype` on `device`.

    The samples depend on the generator alone, not on the block.
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
    """Diagonal [n], its mean over each segment [G] and its sum [], in float64 on the CPU, from so many products."""

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

    `segments` [n] holds the segment of each entry, -1 for none. The errors are those of a mean of `products` independent
    samples.

    Raises:
        CurvatureError: There are fewer than 2 products, or one is not finite or has another shape.
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
    """Estimate as `hutchinson` does, on what a sketch of A leaves: tr(A) = tr(Q^T A Q) + tr((I - P) A (I - P)), P = Q Q^T.

    Hutch++ (Meyer, Musco, Musco and Woodruff 2021, arXiv:2010.09649, algorithm 1): Q = orth(A S), S random; a third of
    `products` each for A S, A Q and samples of the second term. The diagonal is completed likewise, as in Diag++ (Baston
    and Nakatsukasa 2022, arXiv:2201.10684): diag(A) = diag(P A) + diag((I - P) A P) + diag((I - P) A (I - P)). Far less
    variance where few eigenvalues dominate, none where rank(A) <= products / 3. The errors are those of the samples, given Q.
    Holds Q and A Q, [n, products / 3].

    Raises:
        CurvatureError: There are fewer than 6 products, or one is not finite or has another shape.
    """
    if products < 6:
        raise CurvatureError(f"Hutch++ parts its products in three; {products} are too few, give it at least 6")
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
    """Mean of summarise(z * A z) over random signs z, and its standard error."""
    if samples < 2:
        raise CurvatureError(f"a standard error needs at least 2 products, not {samples}")
    drawn, mean, spread = 0, 0.0, 0.0
    with workers.bar("Hutchinson", "product", samples) as bar:
        while drawn < samples:
            signs = _signs(size, min(options.block, samples - drawn), options.generator)
            image = checked(product, signs.to(options.dtype).to(options.device), f"Hutchinson, sample {drawn + 1}")
            for sample in (signs * image.cpu().double()).T:
                drawn += 1
                found = summarise(sample)
                change = found - mean  # Welford's recurrence: no difference of large sums
                mean = mean + change / drawn
                spread = spread + change * (found - mean)
            bar.update(signs.shape[1])
            bar.set_postfix_str(f"trace {mean[-1]:.3g}")
    return mean, (spread / (drawn - 1) / drawn).sqrt()


def _signs(size: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random signs [size, columns], drawn column by column, so that blocks do not matter."""
    drawn = [torch.randint(0, 2, (size,), generator=generator, dtype=torch.int8) for _ in range(columns)]
    return 2 * torch.stack(drawn, dim=1) - 1


def _summary(size: int, segments: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The function from a diagonal [n] to itself, its mean over each segment, and its sum, in one vector [n + G + 1]."""
    labels = torch.full((size,), -1) if segments is None else segments.cpu()
    if labels.shape != (size,) or (labels < -1).any():
        raise CurvatureError(
            f"segments are a number for each of the {size} entries, -1 where it is in none; got a tensor "
            f"{list(labels.shape)} with numbers from {labels.min()}"
        )
    sizes = torch.bincount(labels + 1)[1:].clamp_min(1)

    def summarise(diagonal: Tensor) -> Tensor:
        sums = torch.zeros(len(sizes) + 1, dtype=diagonal.dtype).index_add_(0, labels + 1, diagonal)
        return torch.cat([diagonal, sums[1:] / sizes, diagonal.sum()[None]])

    return summarise


def _traces(mean: Tensor, error: Tensor, size: int, products: int) -> Traces:
    parts = [Estimate(value, spread) for value, spread in zip(_parts(mean, size), _parts(error, size))]
    return Traces(*parts, products)


def _parts(summary: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    return summary[:size], summary[size:-1], summary[-1]


def _in_blocks(product: Product, vectors: Tensor, block: int, where: str, workers: Workers) -> Tensor:
    images = []
    with workers.bar(where, "product", vectors.shape[1]) as bar:
        for part in vectors.split(block, dim=1):
            images.append(checked(product, part, where))
            bar.update(part.shape[1])
    return torch.cat(images, dim=1)
