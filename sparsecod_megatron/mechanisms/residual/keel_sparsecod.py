"""Keel: N(α · x + f), post-norm whose stream outweighs the branch, so that gradients survive any depth."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .streams_sparsecod import StreamNorm, StreamPath, extension


class Path(StreamPath):
    """The stream, normalised after every join."""

    def __init__(self, settings: dict[str, Any], *, hidden_size: int, num_layers: int, eps: float) -> None:
        super().__init__(settings, hidden_size=hidden_size, num_layers=num_layers, eps=eps)
        self.alpha = self.branches if settings["alpha"] is None else settings["alpha"]
        self.state_in_fp32 = settings["state_dtype"] == "fp32"

    def join(self, sublayer: int) -> nn.Module:
        """N(α · x + f)."""
        return KeelJoin(self.alpha, self.hidden_size, self.eps)


class KeelJoin(StreamNorm):
    """N(α · x + f).

    Args:
        alpha: factor on the stream.
        hidden_size: channels of the norm.
        eps: of the norm.
    """

    def __init__(self, alpha: float, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps)
        self.alpha = alpha

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """Both [..., H] → [..., H], in the state's type."""
        return self.norm(self.alpha * state + branch)


extend = extension(Path)
