"""Attention residuals: every branch reads a softmax over what was written before it, in depth, token by token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .streams_sparsecod import FirstColumn, StreamPath, extension, weighted_sum, widened


class Path(StreamPath):
    """Slots for the embedding and the sums of blocks of branches, [..., slots · H].

    Branch i belongs to block i // size. A branch sees the embedding, all blocks before its own, and what its own has
    summed up so far, if anything.
    """

    def __init__(self, settings: dict[str, Any], *, hidden_size: int, num_layers: int, eps: float) -> None:
        super().__init__(settings, hidden_size=hidden_size, num_layers=num_layers, eps=eps)
        self.size = 2 * settings["block_layers"] or 1
        self.columns = self.sources(self.branches)

    def sources(self, sublayer: int) -> int:
        """Slots that have been written when a sub-layer reads."""
        return 1 + -(-sublayer // self.size)

    def expansion(self) -> nn.Module:
        """The embedding in the first slot."""
        return FirstSlot(self.columns)

    def read(self, sublayer: int) -> nn.Module:
        """A softmax over the written slots; of one, that, as its query would never have a gradient."""
        sources = self.sources(sublayer)
        return DepthAttention(sources, self.hidden_size, self.eps) if sources > 1 else FirstColumn(self.hidden_size)

    def join(self, sublayer: int) -> nn.Module:
        """The branch in its block's slot."""
        return SlotSum(1 + sublayer // self.size, self.columns)

    def view(self, state: Tensor) -> Tensor:
        """The sum of all slots, which is the plain residual stream."""
        return state.unflatten(-1, (self.columns, self.hidden_size)).sum(dim=-2)


class FirstSlot(nn.Module):
    """Embeddings in the first slot, nothing in the others."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def forward(self, embedded: Tensor) -> Tensor:
        """[..., H] → [..., columns · H]."""
        return F.pad(embedded, (0, (self.columns - 1) * embedded.shape[-1]))


class DepthAttention(nn.Module):
    """Σ_i a_i v_i with a = softmax_i(query · (key_gain ⊙ RMS(v_i))), in fp32.

    Args:
        sources: slots that have been written.
        hidden_size: H.
        eps: of the RMS, without which an empty slot would have none.
    """

    def __init__(self, sources: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.sources, self.hidden_size, self.eps = sources, hidden_size, eps
        self.query = nn.Parameter(torch.zeros(hidden_size))
        self.key_gain = nn.Parameter(torch.ones(hidden_size))
        self.observe: Any = None

    def forward(self, state: Tensor) -> Tensor:
        """[..., columns · H] → [..., H]."""
        written = state[..., : self.sources * self.hidden_size].unflatten(-1, (self.sources, self.hidden_size))
        values = widened(written)
        scale = torch.rsqrt(values.square().mean(dim=-1) + self.eps)
        query = (self.query * self.key_gain).to(torch.float32)
        # Not F.linear, which would keep a copy of slots that lie beside unwritten ones.
        weights = torch.softmax((values * query).sum(dim=-1) * scale, dim=-1)
        if self.observe is not None:
            self.observe(weights)
        return weighted_sum(weights, values).to(state.dtype)


class SlotSum(nn.Module):
    """Adds a branch to one slot."""

    def __init__(self, slot: int, columns: int) -> None:
        super().__init__()
        self.slot, self.columns = slot, columns

    def forward(self, branch: Tensor, state: Tensor) -> Tensor:
        """[..., H] and [..., columns · H] → [..., columns · H]."""
        size = branch.shape[-1]
        before, own, after = state.split((self.slot * size, size, (self.columns - 1 - self.slot) * size), dim=-1)
        return torch.cat((before, own + branch, after), dim=-1)


extend = extension(Path)
