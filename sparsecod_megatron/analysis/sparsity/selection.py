"""Which keys a query keeps when it may keep a share of those it sees, chosen by patterns of sparse attention.

Every pattern ranks a query's visible keys, and budget b keeps the first ceil(b · n) of n; patterns of blocks
keep whole blocks until there are as many, and the query's own block first. So a smaller budget keeps a part of what a
larger one keeps, budget 1 keeps all, and nothing that comes after a query has a say in what it keeps.

    oracle          by the query's own weight: no choice of as many keys keeps more mass
    vertical_slash  by the mass of the key's column, or of its diagonal if that is more, over the last 64 queries,
                    the query itself the last of them
    block_64        blocks of 64 keys by their mass over the same 64 queries
    window_sink     the query's own key, the first four keys, then the nearest

Published methods choose once for a block of queries, or for a whole prompt by its last queries: what an early query
keeps then depends on later tokens. Here the probe of 64 queries slides along, so at the last query of a block it is the
probe of a method that chooses for blocks of 64 queries, with all their weights known.

Source: vertical-slash: Jiang et al., MInference 1.0 (arXiv 2407.02490); window and sink: Xiao et al., Efficient
Streaming Language Models with Attention Sinks (arXiv 2309.17453); the comparison: Nawrot et al., The Sparse Frontier
(arXiv 2504.17768).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecod_megatron.analysis.sparsity.attention import Call

BLOCK = 64
PROBE = 64
NUM_SINKS = 4
_SLACK = 1e-9  # a share of a count is a whole number only up to rounding


@dataclass(frozen=True)
class Rows:
    """Softmax rows of consecutive queries of one sequence.

    Attributes:
        module: the attention that calls.
        call: what the attention was given.
        part: the queries.
        weights: `[1, heads, queries, keys]`.
        visible: `[1, heads or 1, queries, keys]` bool.
        earlier: `[1, heads, at most PROBE − 1, keys]`, the rows before them.
    """

    module: nn.Module
    call: Call
    part: slice
    weights: Tensor
    visible: Tensor
    earlier: Tensor

    @property
    def positions(self) -> Tensor:
        """Positions of the queries among the keys."""
        first = self.call.first_position
        return torch.arange(first + self.part.start, first + self.part.stop, device=self.weights.device)

    @property
    def distances(self) -> Tensor:
        """From each query back to each key, `[queries, keys]`; negative for later keys."""
        keys = torch.arange(self.weights.shape[-1], device=self.weights.device)
        return self.positions[:, None] - keys


@dataclass(frozen=True)
class Order:
    """Visible keys of each query from the first that is kept to the last.

    Attributes:
        rank: `[1, heads, queries, keys]` int; hidden keys come last.
        visible: `[1, heads or 1, queries, keys]` bool.
        blocks: whether whole blocks are kept.
    """

    rank: Tensor
    visible: Tensor
    blocks: bool

    def kept(self, budget: float) -> Tensor:
        """Which keys stay, `[1, heads, queries, keys]` bool.

        Args:
            budget: share of the visible keys, above 0.
        """
        count = (budget * self.visible.sum(-1, keepdim=True).double() - _SLACK).ceil()
        rank = self.rank
        if self.blocks:
            keys = rank.shape[-1]
            whole = F.pad(rank, (0, -keys % BLOCK), value=keys).unflatten(-1, (-1, BLOCK))
            rank = whole.amin(-1, keepdim=True).expand(whole.shape).flatten(-2)[..., :keys]
        return (rank < count) & self.visible


Pattern = Callable[[Rows], Order]


def oracle(rows: Rows) -> Order:
    """By the query's own weight."""
    return _ordered(rows.weights, rows)


def vertical_slash(rows: Rows) -> Order:
    """By column or diagonal, whichever has more mass in the probe; a line of the pattern covers one key of a query."""
    columns = probe_mass(rows)
    distances = rows.distances
    recent = by_distance(torch.cat([rows.earlier, rows.weights], 2), _earlier_and_own(rows))
    diagonals = _window_sums(recent, rows.weights.shape[2])
    back = distances.clamp(min=0).expand_as(diagonals)
    return _ordered(torch.maximum(columns, diagonals.gather(-1, back)), rows)


def block_64(rows: Rows) -> Order:
    """Whole blocks by their mass in the probe, the query's own block first."""
    mass = probe_mass(rows)
    blocks = F.pad(mass, (0, -mass.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK)).sum(-1)
    return block_order(blocks, rows)


def window_sink(rows: Rows) -> Order:
    """The own key, the first keys, then the nearest."""
    distances = rows.distances
    priority = -distances.double()
    priority[:, :NUM_SINKS] = 1.0
    priority[distances == 0] = 2.0
    return _ordered(priority.expand_as(rows.weights), rows)


PATTERNS: dict[str, Pattern] = {
    "vertical_slash": vertical_slash,
    "block_64": block_64,
    "window_sink": window_sink,
    "oracle": oracle,
}


def block_order(blocks: Tensor, rows: Rows) -> Order:
    """Whole blocks of keys by a number each, the query's own block first.

    Args:
        blocks: `[1, heads, queries, blocks]`.
        rows: of the queries.
    """
    own = (rows.positions // BLOCK)[:, None] == torch.arange(blocks.shape[-1], device=blocks.device)
    keys = blocks.masked_fill(own, torch.inf).repeat_interleave(BLOCK, -1)[..., : rows.weights.shape[-1]]
    return _ordered(keys, rows, blocks=True)


def probe_mass(rows: Rows) -> Tensor:
    """Weights of each key summed over the last `PROBE` queries up to each: `[1, heads, queries, keys]`, fp64."""
    return _window_sums(torch.cat([rows.earlier, rows.weights], 2), rows.weights.shape[2])


def _earlier_and_own(rows: Rows) -> Tensor:
    """Positions of the rows before, and of the rows themselves."""
    own = rows.positions
    return torch.arange(int(own[0]) - rows.earlier.shape[2], int(own[-1]) + 1, device=own.device)


def by_distance(weights: Tensor, positions: Tensor) -> Tensor:
    """Rows by distance: entry δ of a row at position p is the weight of key p − δ, 0 where there is none."""
    keys = positions[:, None] - torch.arange(weights.shape[-1], device=weights.device)
    return weights.gather(-1, keys.clamp(min=0).expand_as(weights)).masked_fill(keys < 0, 0)


def _window_sums(stacked: Tensor, count: int) -> Tensor:
    """Sums over the last `PROBE` rows up to each of the last `count` rows of `[..., rows, keys]`, fp64."""
    sums = F.pad(stacked.double().cumsum(-2), (0, 0, 1, 0))
    ends = torch.arange(stacked.shape[-2] - count + 1, stacked.shape[-2] + 1, device=stacked.device)
    return sums[..., ends, :] - sums[..., (ends - PROBE).clamp(min=0), :]


def _ordered(priority: Tensor, rows: Rows, *, blocks: bool = False) -> Order:
    """Highest priority first, the earlier key of equal ones."""
    hidden = ~rows.visible
    order = priority.masked_fill(hidden, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return Order(torch.empty_like(order).scatter_(-1, order, places), rows.visible, blocks)
