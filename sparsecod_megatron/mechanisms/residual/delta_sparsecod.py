"""Deep delta learning: a branch says along which direction the stream is rewritten, and by how much."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streams_sparsecod import StreamPath, extension, projected, widened

VALUE_RANGE = 4.0
"""The value that is written lies between 0 and this."""


class Path(StreamPath):
    """The plain stream, rewritten along the branch."""

    def join(self, sublayer: int) -> nn.Module:
        """x + β k (v - kᵀ x)."""
        return DeltaJoin(self.hidden_size, self.settings["beta"], self.eps)


class DeltaJoin(nn.Module):
    """x + β k (v - kᵀ x), k = f / ‖f‖, β = 2σ(w_β · RMS(x) + b_β), v = 4σ(w_v · x + b_v).

    Args:
        hidden_size: H.
        beta: what β begins at.
        eps: of both norms.
    """

    def __init__(self, hidden_size: int, beta: float, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.gate, self.value = (nn.Parameter(torch.zeros(hidden_size)) for _ in range(2))
        self.gate_bias = nn.Parameter(torch.full((1,), math.log(beta / (2 - beta))))
        self.value_bias = nn.Parameter(torch.zeros(1))
        self.observe: Any = None

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """Both [..., H] → [..., H]."""
        x, direction = widened(state), widened(branch)
        direction = direction * torch.rsqrt(direction.square().sum(dim=-1, keepdim=True) + self.eps**2)
        beta = 2 * torch.sigmoid(projected(x, self.gate[None], self.eps) + self.gate_bias)
        value = VALUE_RANGE * torch.sigmoid(F.linear(x, self.value[None].float()) + self.value_bias)
        if self.observe is not None:
            self.observe(beta)
        return (x + beta * (value - (direction * x).sum(dim=-1, keepdim=True)) * direction).to(state.dtype)


extend = extension(Path)
