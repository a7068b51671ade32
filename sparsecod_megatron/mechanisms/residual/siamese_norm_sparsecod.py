"""SiameseNorm: a post-norm and a pre-norm stream that share their branches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streams_sparsecod import StreamPath, extension


class Path(StreamPath):
    """The post-norm stream x, normalised, and the pre-norm stream y, [..., 2 · H]."""

    columns = 2

    def expansion(self) -> nn.Module:
        """N(embedding), and the embedding."""
        return Pair(self.hidden_size, self.eps)

    def read(self, sublayer: int) -> nn.Module:
        """x + N(y), at the end too."""
        return SiameseRead(self.hidden_size, self.eps)

    def join(self, sublayer: int) -> nn.Module:
        """x ← N(x + f / c), y ← y + f."""
        return SiameseJoin(self.hidden_size, self.eps, math.sqrt(2 * (sublayer // 2 + 1)))

    def view(self, state: Tensor) -> Tensor:
        """The pre-norm stream; the other's variance is one by construction."""
        return state[..., self.hidden_size :]


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last axis."""
    return F.rms_norm(x, weight.shape, weight, eps)


class Pair(nn.Module):
    """(N(embedding), embedding).

    Args:
        hidden_size: H.
        eps: of the norm.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(hidden_size))

    def forward(self, embedded: Tensor) -> Tensor:
        """[..., H] → [..., 2 · H]."""
        return torch.cat((normed(embedded, self.weight, self.eps), embedded), dim=-1)


class SiameseRead(nn.Module):
    """x + N(y).

    Args:
        hidden_size: H.
        eps: of the norm.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(hidden_size))

    def forward(self, state: Tensor) -> Tensor:
        """[..., 2 · H] → [..., H]."""
        x, y = state.chunk(2, dim=-1)
        return x + normed(y, self.weight, self.eps)


class SiameseJoin(nn.Module):
    """x ← N(x + f / c), y ← y + f.

    Args:
        hidden_size: H.
        eps: of the norm.
        divisor: c.
    """

    def __init__(self, hidden_size: int, eps: float, divisor: float) -> None:
        super().__init__()
        self.eps, self.divisor, self.weight = eps, divisor, nn.Parameter(torch.ones(hidden_size))

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., 2 · H] → [..., 2 · H]."""
        x, y = state.chunk(2, dim=-1)
        return torch.cat((normed(x + branch / self.divisor, self.weight, self.eps), y + branch), dim=-1)


extend = extension(Path)
