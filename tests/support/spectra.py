"""Matrices with a known spectrum."""

import torch
from torch import Tensor


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def with_spectrum(values) -> Tensor:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    values = torch.as_tensor(values, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=seed(99), dtype=torch.float64)).Q
    return basis @ torch.diag(values) @ basis.T
