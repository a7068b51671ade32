"""Attention whose queries keep a share of their keys in chosen blocks of a model, and what that costs.

loss_increase   cross entropy with the keys kept, minus that with all, in nats per token
recall          share of the full softmax mass that is kept, mean over heads and queries
output_error    Σ‖o' − o‖ ÷ Σ‖o‖ over heads and queries (and blocks), o a head's output with all keys
kept            keys kept ÷ keys that the mask lets the queries see
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.intervals import Array, Interval, ratio_of_sums
from sparsecod_megatron.analysis.sparsity.attention import HIDDEN, Call, RowAttention
from sparsecod_megatron.analysis.sparsity.selection import PROBE, Pattern, Rows
from sparsecod_megatron.hf.calls import Replay, Trace

MEASURES = ("loss_increase", "recall", "output_error", "kept")
MAX_SPARSE_SCORES = 1 << 22
"""Rows held at once; choosing among them takes a dozen times their memory, 200 MiB."""
COSTS = ("recall", "rows", "error", "size", "kept", "visible")
"""Sums over heads and queries: share of the softmax mass that is kept; one; ‖Δo‖ and ‖o‖ of a head's output o; keys
that are kept, and that the mask lets the query see."""


class SparseAttention(RowAttention):
    """The model's own attention, until some blocks are told what to keep.

    Args:
        blocks: the model's blocks, in order.
        max_scores: bound on the attention weights held at once (never less than one query's).
    """

    def __init__(self, blocks: Iterable[nn.Module], max_scores: int = MAX_SPARSE_SCORES) -> None:
        super().__init__(blocks, max_scores)
        self._layers: Collection[int] = ()
        self._pattern: Pattern | None = None
        self._budget = 1.0
        self._earlier: Tensor | None = None
        self._costs: dict[int, dict[nn.Module, list[Tensor]]] = {}

    @contextmanager
    def keeping(self, layers: Collection[int], pattern: Pattern, budget: float) -> Iterator[None]:
        """Queries of these blocks keep what the pattern chooses while the `with` block runs.

        Args:
            layers: indices of blocks.
            pattern: ranks the keys.
            budget: share of the visible keys.
        """
        self._layers, self._pattern, self._budget = layers, pattern, budget
        self._costs.clear()
        try:
            yield
        finally:
            self._layers, self._pattern, self._earlier = (), None, None

    def costs(self, layer: int) -> Tensor:
        """`COSTS` of the block's attentions in the last `keeping`: `[sequences, 6]`, fp64 on the CPU."""
        return torch.stack([torch.stack(found) for found in self._costs[layer].values()]).sum(0)

    def rows(
        self, layer: int | None, module: nn.Module, call: Call, part: slice, scores: Tensor, values: Tensor
    ) -> Tensor:
        """See `RowAttention`."""
        if layer is None or self._pattern is None or layer not in self._layers:
            return super().rows(layer, module, call, part, scores, values)
        dense = call.softmax(scores)
        earlier = dense[:, :, :0] if part.start == 0 or self._earlier is None else self._earlier
        rows = Rows(module, call, part, dense, call.visible(part), earlier)
        kept = self._pattern(rows).kept(self._budget)
        self._earlier = torch.cat([earlier, dense], 2)[:, :, -(PROBE - 1) :]
        output = call.softmax(scores.masked_fill(~kept, HIDDEN)) @ values
        found = self._costs.setdefault(layer, {}).setdefault(module, [])
        if part.start == 0:
            found.append(torch.zeros(len(COSTS), dtype=torch.float64))
        found[-1] += _costs(dense, kept, rows.visible, dense @ values, output)
        return output


def _costs(dense: Tensor, kept: Tensor, visible: Tensor, whole: Tensor, output: Tensor) -> Tensor:
    mass, kept_mass = dense.sum(-1), (dense * kept).sum(-1)
    recall = torch.where(mass > 0, kept_mass / mass, 1.0)
    rows = torch.tensor(recall.numel(), device=dense.device)
    error, size = ((part.double().norm(dim=-1)).sum() for part in (output - whole, whole))
    counts = kept.sum(), visible.expand_as(kept).sum()
    return torch.stack([part.double() for part in (recall.sum(), rows, error, size, *counts)]).cpu()


def all_sparse(
    replay: Replay, trace: Trace, attention: SparseAttention, layers: Collection[int], pattern: Pattern, budget: float
) -> Tensor:
    """Loss, the same for each layer, and `COSTS` with all blocks sparse: `[B, layers, 7]`, fp64 on the CPU.

    Args:
        replay: of the model, which attends through `attention`.
        trace: a micro-batch with all keys.
        attention: of the model's blocks.
        layers: blocks with attention.
        pattern: ranks the keys.
        budget: share of the visible keys.
    """
    with attention.keeping(layers, pattern, budget):
        losses = replay.losses_after(trace, range(len(trace.calls)), trace.hidden[0])
        costs = torch.stack([attention.costs(layer) for layer in layers], 1)
    return torch.cat([losses[:, None, None].expand(-1, len(layers), 1), costs], 2)


class Measures:
    """`MEASURES` of sums by sequence.

    Args:
        sums: increase of the loss and `COSTS`, `[sequences, ..., 7]`.
        seed: of the intervals.
    """

    def __init__(self, sums: Array, seed: int) -> None:
        loss, recall, rows, error, size, kept, visible = np.moveaxis(sums, -1, 0)
        self._parts = {
            "loss_increase": (loss, np.ones_like(loss)),
            "recall": (recall, rows),
            "output_error": (error, size),
            "kept": (kept, visible),
        }
        self._estimates = {name: ratio_of_sums(*parts, seed=seed) for name, parts in self._parts.items()}

    def interval(self, measure: str, *index: int) -> Interval:
        """One measure of one cell."""
        return self._estimates[measure].at(*index)

    def per_sequence(self, measure: str, *index: int) -> Array:
        """A measure of each sequence."""
        above, below = (part[(slice(None), *index)] for part in self._parts[measure])
        quotient: Array = above / below
        return quotient

    def row(self, *index: int) -> dict[str, Any]:
        """All measures of one cell with their intervals, as columns of a table."""
        return columns({name: self.interval(name, *index) for name in MEASURES})


def columns(intervals: dict[str, Interval]) -> dict[str, Any]:
    """Each with its ends, as columns of a table."""
    columns: dict[str, Any] = {}
    for name, interval in intervals.items():
        columns |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return columns
