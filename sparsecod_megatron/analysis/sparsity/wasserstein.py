"""Wasserstein-1 distance between a neuron's standardised output and the standard normal.

Near 0 for a neuron that averages many inputs, larger for one that answers to few: Laplace 0.14, two clear modes 0.3 and
more. Source: Sawmya et al., Wasserstein Distances, Neuronal Entanglement, and Sparsity (2024).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def distance_to_normal(samples: Tensor) -> Tensor:
    """W₁ between each column's standardised samples and N(0, 1), exact for the empirical distribution.

    The i-th smallest sample stands for probabilities `[(i−1)/n, i/n]`; `∫ |x_i − Φ⁻¹(u)| du` over that cell has a
    closed form, since `∫ Φ⁻¹(u) du = −φ(Φ⁻¹(u))`. The cell is split where the normal quantile crosses the sample.

    Args:
        samples: `[samples, neurons]`, at least two samples.

    Returns:
        `[neurons]`, fp64; NaN for a neuron with constant output, whose shape is undefined.
    """
    x = samples.double()
    x = (x - x.mean(0)) / x.std(0, correction=0)
    x = x.sort(0).values
    n = x.shape[0]
    edges = torch.arange(n + 1, dtype=torch.float64, device=x.device)[:, None] / n
    bounds = torch.special.ndtri(edges)
    low, high = bounds[:-1], bounds[1:]
    middle = x.clamp(min=low, max=high)
    below = x * (torch.special.ndtr(middle) - edges[:-1]) - (_density(low) - _density(middle))
    above = (_density(middle) - _density(high)) - x * (edges[1:] - torch.special.ndtr(middle))
    return (below + above).sum(0)


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
