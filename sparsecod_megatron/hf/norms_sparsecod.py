"""Norms of the `sparsecod` architecture.

Copied as it is into an export, so it imports nothing of this package but its neighbours.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_sparsecod import SparsecodConfig


class SparsecodRMSNorm(nn.Module):
    """scale · weight · x / sqrt(mean(x²) + eps) over the last axis; 1 + weight in its place if that is zero-centred.

    Args:
        size: channels.
        config: says the epsilon, and whether weights are zero-centred.
        scale: constant factor.
    """

    def __init__(self, size: int, config: SparsecodConfig, scale: float = 1.0) -> None:
        super().__init__()
        self.is_zero_centred = config.layernorm_zero_centered_gamma
        self.weight = nn.Parameter(torch.zeros(size) if self.is_zero_centred else torch.ones(size))
        self.eps, self.scale = config.rms_norm_eps, scale

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        if self.is_zero_centred:
            wide = x if x.dtype == torch.float64 else x.float()
            normed = F.rms_norm(wide, self.weight.shape, 1 + self.weight.to(wide.dtype), self.eps).to(x.dtype)
        else:
            normed = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self.scale * normed


class SparsecodLayerNorm(SparsecodRMSNorm):
    """scale · (weight · (x - mean(x)) / sqrt(var(x) + eps) + bias) over the last axis."""

    def __init__(self, size: int, config: SparsecodConfig, scale: float = 1.0) -> None:
        super().__init__(size, config, scale)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size]."""
        return self.scale * F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[SparsecodRMSNorm]] = {"RMSNorm": SparsecodRMSNorm, "LayerNorm": SparsecodLayerNorm}
"""By `normalization`."""
