"""Multi-gate residuals: n streams, each of which a gate moves towards the branch, so that none can grow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .streams_sparsecod import ManyStreams, extension, projected, weighted_sum


class Path(ManyStreams):
    """n streams, [..., n · H], all of which begin as the embedding."""

    def read(self, sublayer: int) -> nn.Module:
        """A softmax over the streams, at the end too."""
        return StreamAttention(self.columns, self.hidden_size, self.eps)

    def join(self, sublayer: int) -> nn.Module:
        """Each stream a share nearer to the branch."""
        bias, spread = self.settings["gate_bias"], self.settings["spread"]
        bias = depth_bias(self.branches) if bias is None else bias
        return GateJoin(self.columns, self.hidden_size, self.eps, bias, spread)


def depth_bias(branches: int) -> float:
    """The bias of a gate whose share falls with the square root of the number of branches."""
    return -math.log(math.sqrt(branches / 21) * (1 + math.exp(3)) - 1)


class StreamAttention(nn.Module):
    """Σ_s a_s x_s, a = softmax_s(query · unit(x_s) / √H).

    Args:
        streams: n.
        hidden_size: H.
        eps: of the RMS.
    """

    def __init__(self, streams: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.streams, self.eps = streams, eps
        self.query = nn.Parameter(torch.zeros(hidden_size))

    def forward(self, state: Tensor) -> Tensor:
        """[..., n · H] → [..., H]."""
        x = state.unflatten(-1, (self.streams, -1))
        scores = projected(x, self.query[None], self.eps).squeeze(-1) / math.sqrt(x.shape[-1])
        return weighted_sum(torch.softmax(scores, dim=-1), x)


class GateJoin(nn.Module):
    """x_s ← (1 - β_s) x_s + β_s f, β_s = σ(query · unit(x_s) / √H + bias_s).

    Args:
        streams: n.
        hidden_size: H.
        eps: of the RMS.
        bias: mean of what the biases begin at.
        spread: from the first stream's to the last one's.
    """

    def __init__(self, streams: int, hidden_size: int, eps: float, bias: float, spread: float) -> None:
        super().__init__()
        self.streams, self.eps = streams, eps
        self.query = nn.Parameter(torch.zeros(hidden_size))
        places = torch.linspace(-0.5, 0.5, streams) if streams > 1 else torch.zeros(1)
        self.bias = nn.Parameter(bias + spread * places)
        self.observe: Any = None

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., n · H] → [..., n · H]."""
        x = state.unflatten(-1, (self.streams, -1))
        scores = projected(x, self.query[None], self.eps).squeeze(-1) / math.sqrt(x.shape[-1])
        gates = torch.sigmoid(scores + self.bias)
        if self.observe is not None:
            self.observe(gates, x)
        return torch.lerp(x, branch.unsqueeze(-2).expand_as(x), gates.unsqueeze(-1).to(x.dtype)).flatten(start_dim=-2)


extend = extension(Path)
