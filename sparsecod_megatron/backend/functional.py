"""Functions that reference modules call by attribute, so that the CPU backend can put faster ones in their place."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, [..., H] and [H] → [..., H]."""
    return F.rms_norm(x, weight.shape, weight, eps)
