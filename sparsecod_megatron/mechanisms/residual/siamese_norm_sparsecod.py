"""SiameseNorm: a post-norm and a pre-norm stream that share their branches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .streams_sparsecod import StreamNorm, StreamPath, extension


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


class Pair(StreamNorm):
    """(N(embedding), embedding)."""

    def forward(self, embedded: Tensor) -> Tensor:
        """[..., H] → [..., 2 · H]."""
        return torch.cat((self.norm(embedded), embedded), dim=-1)


class SiameseRead(StreamNorm):
    """x + N(y)."""

    def forward(self, state: Tensor) -> Tensor:
        """[..., 2 · H] → [..., H]."""
        x, y = state.chunk(2, dim=-1)
        return x + self.norm(y)


class SiameseJoin(StreamNorm):
    """x ← N(x + f / c), y ← y + f.

    Args:
        hidden_size: H.
        eps: of the norm.
        divisor: c.
    """

    def __init__(self, hidden_size: int, eps: float, divisor: float) -> None:
        super().__init__(hidden_size, eps)
        self.divisor = divisor

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., 2 · H] → [..., 2 · H]."""
        x, y = state.chunk(2, dim=-1)
        return torch.cat((self.norm(x + branch / self.divisor), y + branch), dim=-1)


extend = extension(Path)
