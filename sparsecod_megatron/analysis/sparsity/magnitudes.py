"""How concentrated the magnitudes of one tensor are: shares below a threshold, Hoyer's measure and the Gini index."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def share_below(weight: Tensor, threshold: float) -> float:
    """Share of elements with |w| < threshold.

    Args:
        weight: any shape.
        threshold: in the units of the weight; exact zeros count as soon as it is positive.
    """
    return float((weight.abs() < threshold).sum()) / weight.numel()


def hoyer(weight: Tensor) -> float:
    """Hoyer's sparsity `(√n − ‖w‖₁/‖w‖₂) / (√n − 1)`: 0 for equal magnitudes, 1 for a single non-zero element.

    A normal distribution gives `1 − √(2/π) ≈ 0.202` for large n. An all-zero tensor counts as 1.

    Args:
        weight: any shape, at least two elements.

    Source: Hoyer, Non-negative Matrix Factorization with Sparseness Constraints (2004).
    """
    root = math.sqrt(weight.numel())
    l1 = float(weight.abs().sum(dtype=torch.float64))
    l2 = math.sqrt(float(weight.float().square().sum(dtype=torch.float64)))
    return 1.0 if l2 == 0 else (root - l1 / l2) / (root - 1)


def gini(weight: Tensor) -> float:
    """Gini index of the magnitudes: 0 for equal ones, `1 − 1/n` for a single non-zero element.

    A normal distribution gives `√2 − 1 ≈ 0.414`. An all-zero tensor counts as 1.

    Args:
        weight: any shape.

    Source: Hurley and Rickard, Comparing Measures of Sparsity (2009).
    """
    magnitudes = weight.abs().float().flatten().sort().values
    n = magnitudes.numel()
    total = weighted = 0.0
    start = 1
    for part in magnitudes.split(1 << 20):  # fp64 sums without an fp64 copy of the whole tensor
        rank = torch.arange(start, start + part.numel(), dtype=torch.float64, device=part.device)
        total += float(part.sum(dtype=torch.float64))
        weighted += float((rank * part).sum())
        start += part.numel()
    return 1.0 if total == 0 else 2 * weighted / (n * total) - (n + 1) / n
