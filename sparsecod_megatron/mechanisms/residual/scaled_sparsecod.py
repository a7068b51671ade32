"""skip · x + branch · f, with constant or learned factors: the null model of all residual remedies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .streams_sparsecod import StreamPath, extension


class Path(StreamPath):
    """The plain stream, joined with factors."""

    def join(self, sublayer: int) -> nn.Module:
        """skip · x + branch · f."""
        size = {"none": 0, "scalar": 1, "channel": self.hidden_size}[self.settings["learn"]]
        return ScaledJoin(self.settings["skip"], self.settings["branch"], size)


class ScaledJoin(nn.Module):
    """skip · x + branch · f.

    Args:
        skip: constant factor on the stream.
        branch: factor on the branch, or what it starts at.
        size: of the learned factor: 1, the channels, or 0 for a constant.
    """

    def __init__(self, skip: float, branch: float, size: int) -> None:
        super().__init__()
        self.skip = skip
        self.factor = nn.Parameter(torch.full((size,), branch)) if size else branch

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """Both [..., H] → [..., H]."""
        return (state if self.skip == 1.0 else self.skip * state) + self.factor * branch


extend = extension(Path)
