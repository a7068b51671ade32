"""The join of LayerDrop: a branch times a number of the step."""

from __future__ import annotations

from torch import Tensor, nn

from sparsecod_megatron.mechanisms.residual.streams_sparsecod import StreamPath


class DropPath(StreamPath):
    """The plain stream, with joins that can be shut."""

    def __init__(self) -> None:
        """It needs neither settings nor sizes."""

    def join(self, sublayer: int) -> nn.Module:
        """x + factor · f."""
        return DropJoin()


class DropJoin(nn.Module):
    """x + factor · f, with the factor 1 until a step sets another."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """Both [..., H] → [..., H]."""
        # Times 0, not left out: a parameter without a gradient would keep its bucket from being reduced.
        return state + (branch if self.factor == 1.0 else self.factor * branch)
