"""Hyper-connections: n residual streams, mixed by matrices of which a part depends on the token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streams_sparsecod import ManyStreams, StreamMean, extension, mixed_and_written, projected, weighted_sum


class Path(ManyStreams):
    """n streams, [..., n · H], all of which begin as the embedding."""

    def read(self, sublayer: int) -> nn.Module:
        """A weighted sum; at the end the mean."""
        if sublayer == self.branches:
            return StreamMean(self.columns)
        return HyperRead(sublayer % self.columns, self.columns, self.hidden_size, self.settings["scale"], self.eps)

    def join(self, sublayer: int) -> nn.Module:
        """Mixed streams, and a share of the branch in each."""
        return HyperJoin(self.columns, self.hidden_size, self.settings["scale"], self.eps)


class HyperRead(nn.Module):
    """Σ_s (static_s + scale · tanh(unit(x_s) · dynamic)) x_s.

    Args:
        first: the stream that is read at first.
        streams: n.
        hidden_size: H.
        scale: what the scale begins at.
        eps: of the RMS.
    """

    def __init__(self, first: int, streams: int, hidden_size: int, scale: float, eps: float) -> None:
        super().__init__()
        self.streams, self.eps = streams, eps
        self.static = nn.Parameter(F.one_hot(torch.tensor(first), streams).float())
        self.dynamic = nn.Parameter(torch.zeros(hidden_size))
        self.scale = nn.Parameter(torch.full((1,), scale))

    def forward(self, state: Tensor) -> Tensor:
        """[..., n · H] → [..., H]."""
        x = state.unflatten(-1, (self.streams, -1))
        moved = torch.tanh(projected(x, self.dynamic[None], self.eps)).squeeze(-1)
        weights = self.static + self.scale * moved
        return weighted_sum(weights, x)


class HyperJoin(nn.Module):
    """x_t ← Σ_s A_st x_s + B_t f, A_st = static_st + scale · tanh(unit(x_s) · dynamic_t), B alike.

    Args:
        streams: n.
        hidden_size: H.
        scale: what the scales begin at.
        eps: of the RMS.
    """

    def __init__(self, streams: int, hidden_size: int, scale: float, eps: float) -> None:
        super().__init__()
        self.streams, self.eps = streams, eps
        self.static_mixing = nn.Parameter(torch.eye(streams))
        self.static_write = nn.Parameter(torch.ones(streams))
        # Mixing in the first rows, what is written in the last: one product of the normalised streams.
        self.dynamic = nn.Parameter(torch.zeros(streams + 1, hidden_size))
        self.scales = nn.Parameter(torch.full((2,), scale))
        self.observe: Any = None

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., n · H] → [..., n · H]."""
        x = state.unflatten(-1, (self.streams, -1))
        moved = torch.tanh(projected(x, self.dynamic, self.eps))
        mixing = (self.static_mixing + self.scales[0] * moved[..., :-1]).transpose(-1, -2)
        write = self.static_write + self.scales[1] * moved[..., -1]
        if self.observe is not None:
            self.observe(mixing, write, x)
        return mixed_and_written(mixing, write, x, branch)


extend = extension(Path)
