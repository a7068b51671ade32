"""What residual paths share: the plain stream to start from, and n streams packed side by side.

Projections have a backward pass of their own, which keeps the state as it is and a few numbers of each token. Copied
beside the code of every path into an export. A path (the package's seams/residual.py) is built from a mechanism's
settings and the model's sizes; tensors are [..., columns · H] and [..., H].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class StreamPath:
    """The plain stream, read as it is; a path overrides what differs.

    Args:
        settings: of the mechanism.
        hidden_size: H.
        num_layers: L; each has two branches.
        eps: of the model's norms.
    """

    columns = 1
    state_in_fp32 = False

    def __init__(self, settings: dict[str, Any], *, hidden_size: int, num_layers: int, eps: float) -> None:
        self.settings, self.hidden_size, self.eps, self.branches = settings, hidden_size, eps, 2 * num_layers

    def expansion(self) -> nn.Module | None:
        """The embeddings are the first state."""
        return None

    def read(self, sublayer: int) -> nn.Module | None:
        """The state is what is read."""
        return None

    def view(self, state: Tensor) -> Tensor:
        """The state itself."""
        return state


class ManyStreams(StreamPath):
    """n streams that all begin as the embedding, and are seen as their mean."""

    def __init__(self, settings: dict[str, Any], *, hidden_size: int, num_layers: int, eps: float) -> None:
        super().__init__(settings, hidden_size=hidden_size, num_layers=num_layers, eps=eps)
        self.columns = settings["streams"]

    def expansion(self) -> nn.Module:
        """Copies."""
        return Copies(self.columns)

    def view(self, state: Tensor) -> Tensor:
        """The mean of all streams."""
        mean: Tensor = StreamMean(self.columns)(state)
        return mean


class Copies(nn.Module):
    """Every stream begins as the embedding."""

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = streams

    def forward(self, embedded: Tensor) -> Tensor:
        """[..., H] → [..., n · H]."""
        return embedded.repeat(*(1 for _ in embedded.shape[:-1]), self.streams)


class StreamMean(nn.Module):
    """The mean of the streams."""

    def __init__(self, streams: int) -> None:
        super().__init__()
        self.streams = streams

    def forward(self, state: Tensor) -> Tensor:
        """[..., n · H] → [..., H]."""
        return state.unflatten(-1, (self.streams, -1)).mean(dim=-2)


class FirstColumn(nn.Module):
    """The first of the vectors of a token."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size

    def forward(self, state: Tensor) -> Tensor:
        """[..., columns · H] → [..., H]."""
        return state[..., : self.hidden_size]


class StreamNorm(nn.Module):
    """Base of reads and joins with an RMSNorm.

    Args:
        hidden_size: H.
        eps: of the norm.
    """

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(hidden_size))

    def norm(self, x: Tensor) -> Tensor:
        """RMSNorm over the last axis, in the type of x."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def widened(x: Tensor) -> Tensor:
    """In fp32, or fp64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def projected(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / RMS(x) of [..., d] and [out, d] → [..., out], in fp32 or better."""
    result: Tensor = _Projection.apply(x, weight, eps)
    return result


def weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """Σ_s weights_s x_s of [..., n] and [..., n, H] → [..., H], in the vectors' type."""
    return (weights.unsqueeze(-1) * x).sum(dim=-2).to(x.dtype)


def mixed_and_written(mixing: Tensor, write: Tensor, x: Tensor, branch: Tensor) -> Tensor:
    """x_t ← Σ_s mixing_ts x_s + write_t branch, packed.

    Args:
        mixing: [..., n, n], to and from.
        write: [..., n].
        x: [..., n, H].
        branch: [..., H].
    """
    written = write.unsqueeze(-1).to(x.dtype) * branch.unsqueeze(-2)
    # One call adds and multiplies: on a CPU it takes 0.7 of the time of two.
    tokens = (part.flatten(end_dim=-3) for part in (written, mixing.to(x.dtype), x))
    return torch.baddbmm(*tokens).view(*x.shape[:-2], -1)


class _Projection(torch.autograd.Function):
    """Keeps x as it is and numbers of tokens: neither a wide copy nor a normalised one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / wide.shape[-1]
        inverse = torch.rsqrt(mean_square + eps)
        result = F.linear(wide, weight.to(wide.dtype)) * inverse
        ctx.save_for_backward(x, weight, inverse, result)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, inverse, result = ctx.saved_tensors
        wide, scaled = widened(x), gradient * inverse
        # By the norm, whose derivative is -x / (d · RMS³): the share of the gradient that lies along the result.
        along = (gradient * result).sum(dim=-1, keepdim=True) * inverse.square() / x.shape[-1]
        to_x = torch.addcmul(scaled @ weight.to(wide.dtype), along, wide, value=-1)
        to_weight = scaled.flatten(end_dim=-2).T @ wide.flatten(end_dim=-2)
        return to_x.to(x.dtype), to_weight.to(weight.dtype), None


def extension(path: type) -> Callable[[Any, dict[str, Any], Any, int], None]:
    """What gives a layer of the `sparsecod` architecture this path."""

    def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
        layer.connect(path, settings, config, index)

    return extend
