"""How many directions a matrix has: stable and effective rank, from its singular values."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(matrix: Tensor) -> tuple[float, float]:
    """Stable and effective rank.

        stable rank     Σσ² / σ₁²
        effective rank  exp(−Σ p ln p), p = σ / Σσ

    Both are r for r equal singular values, and 0 for a matrix of zeros.

    Args:
        matrix: [rows, columns], or [experts, rows, columns], whose experts' mean it is.

    Source: Rudelson and Vershynin, Sampling from large matrices (2007), for the stable rank; Roy and Vetterli, The
        effective rank (2007).
    """
    values = _singular_values(matrix.flatten(end_dim=-3) if matrix.ndim > 3 else matrix)
    energy, largest = values.square().sum(-1), values[..., 0].square()
    shares = values / values.sum(-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    effective = torch.special.entr(shares).sum(-1).exp().where(largest > 0, 0.0)
    stable = (energy / largest).where(largest > 0, 0.0)
    return float(stable.mean()), float(effective.mean())


def _singular_values(matrix: Tensor) -> Tensor:
    """[…, smaller side], descending, from the Gram matrix of the smaller side: a fraction of a decomposition's time.

    In float64, in which squaring loses singular values below 1e-8 of the largest only.
    """
    wide = matrix.double()
    if wide.shape[-2] > wide.shape[-1]:
        wide = wide.mT
    return torch.linalg.eigvalsh(wide @ wide.mT).clamp_min_(0).sqrt_().flip(-1)
