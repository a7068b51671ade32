"""Manifold-constrained hyper-connections: n residual streams whose mixing matrices are doubly stochastic."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .streams_sparsecod import ManyStreams, StreamMean, extension, mixed_and_written, projected, weighted_sum

IDENTITY_LOGIT = 8.0
"""By how much the identity's logits lead at the beginning: what else is mixed in is below 3e-4 each."""


class Path(ManyStreams):
    """n streams, [..., n · H], all of which begin as the embedding."""

    def read(self, sublayer: int) -> nn.Module:
        """Gated streams, summed; at the end the mean."""
        if sublayer == self.branches:
            return StreamMean(self.columns)
        return GatedRead(self.columns, self.hidden_size, self.settings["scale"], self.eps)

    def join(self, sublayer: int) -> nn.Module:
        """Mixed streams, and a gated share of the branch in each."""
        return ManifoldJoin(self.hidden_size, self.eps, self.settings)


class GatedRead(nn.Module):
    """Σ_s σ(scale · (W u)_s + bias_s) x_s, u the whole state over its RMS.

    Args:
        streams: n.
        hidden_size: H.
        scale: what the scale begins at.
        eps: of the RMS.
    """

    def __init__(self, streams: int, hidden_size: int, scale: float, eps: float) -> None:
        super().__init__()
        self.streams, self.eps = streams, eps
        self.weight = nn.Parameter(torch.zeros(streams, streams * hidden_size))
        self.bias = nn.Parameter(torch.zeros(streams))
        self.scale = nn.Parameter(torch.full((1,), scale))

    def forward(self, state: Tensor) -> Tensor:
        """[..., n · H] → [..., H]."""
        x = state.unflatten(-1, (self.streams, -1))
        gates = torch.sigmoid(self.scale * projected(state, self.weight, self.eps) + self.bias)
        return weighted_sum(gates, x)


class ManifoldJoin(nn.Module):
    """x ← M x + 2σ(scale · W_w u + bias_w) f, M of logits scale · W_m u + bias_m.

    With `mixing: sinkhorn` M is exp(logits) made doubly stochastic, with `permutations` Σ_k softmax(logits)_k P_k over
    all n! of them.

    Args:
        hidden_size: H.
        eps: of the RMS.
        settings: of the mechanism.
    """

    def __init__(self, hidden_size: int, eps: float, settings: dict[str, Any]) -> None:
        super().__init__()
        self.streams = streams = settings["streams"]
        self.eps, self.steps, self.is_sinkhorn = eps, settings["sinkhorn_steps"], settings["mixing"] == "sinkhorn"
        self.orders = [] if self.is_sinkhorn else list(itertools.permutations(range(streams)))  # the identity first
        logits = torch.eye(streams).flatten() if self.is_sinkhorn else torch.eye(len(self.orders))[0]
        lead = IDENTITY_LOGIT if settings["mix_init"] == "identity" else 0.0
        self.weight = nn.Parameter(torch.zeros(streams + len(logits), streams * hidden_size))
        self.write_bias = nn.Parameter(torch.zeros(streams))
        self.mixing_bias = nn.Parameter(lead * logits)
        self.scales = nn.Parameter(torch.full((2,), settings["scale"]))
        self.observe: Any = None

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., n · H] → [..., n · H]."""
        logits = projected(state, self.weight, self.eps)
        write = 2 * torch.sigmoid(self.scales[0] * logits[..., : self.streams] + self.write_bias)
        mixing = self.matrix(self.scales[1] * logits[..., self.streams :] + self.mixing_bias)
        x = state.unflatten(-1, (self.streams, -1))
        if self.observe is not None:
            self.observe(mixing, write, x)
        return mixed_and_written(mixing, write, x, branch)

    def matrix(self, logits: Tensor) -> Tensor:
        """Logits [..., n² or n!] → M [..., to, from]."""
        if self.is_sinkhorn:
            return sinkhorn(logits.unflatten(-1, (self.streams, self.streams)), self.steps)
        permutations = F.one_hot(torch.tensor(self.orders, device=logits.device), self.streams).to(logits.dtype)
        return F.linear(torch.softmax(logits, dim=-1), permutations.flatten(start_dim=1).T).unflatten(
            -1, (self.streams, self.streams)
        )


def sinkhorn(logits: Tensor, steps: int) -> Tensor:
    """exp(logits) [..., to, from] with rows and columns divided by their sums in turns, columns last.

    Columns say how a stream is spread, so that their sums, which are exact, keep the mean of all streams.
    """
    result: Tensor = _Sinkhorn.apply(logits, steps)
    return result


class _Sinkhorn(torch.autograd.Function):
    """Keeps the logits alone and repeats the iteration on the way back; tokens last, which is what vectorises.

    The first row and column are divided by logarithms. From there on every sum is at least 1 / n²: what has been
    divided has an entry of at least 1 / n, and what that entry is divided by next is at most n.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, steps: int) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.steps = steps
        matrix = torch.softmax(torch.log_softmax(_tokens_last(logits), dim=1), dim=0)
        for _ in range(steps - 1):
            for dim in (1, 0):
                matrix = matrix / matrix.sum(dim=dim, keepdim=True)
        return _tokens_first(matrix, logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (logits,) = ctx.saved_tensors
        first = torch.log_softmax(_tokens_last(logits), dim=1)
        columns = matrix = torch.softmax(first, dim=0)
        divided: list[tuple[int, Tensor, Tensor]] = []
        for _ in range(ctx.steps - 1):
            for dim in (1, 0):
                sums = matrix.sum(dim=dim, keepdim=True)
                matrix = matrix / sums
                divided.append((dim, sums, matrix))
        given = _tokens_last(gradient)
        for dim, sums, matrix in reversed(divided):
            given = (given - (given * matrix).sum(dim=dim, keepdim=True)) / sums
        given = columns * (given - (given * columns).sum(dim=0, keepdim=True))
        given = given - first.exp() * given.sum(dim=1, keepdim=True)
        return _tokens_first(given, logits), None


def _tokens_last(matrices: Tensor) -> Tensor:
    """[..., n, n] → [n, n, tokens]."""
    return matrices.flatten(end_dim=-3).permute(1, 2, 0).contiguous()


def _tokens_first(matrices: Tensor, like: Tensor) -> Tensor:
    """The way back."""
    return matrices.permute(2, 0, 1).reshape(like.shape)


extend = extension(Path)
