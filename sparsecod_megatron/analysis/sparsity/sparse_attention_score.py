"""The `sparse_attention` score: what it costs a model that its queries keep a share of their keys.

For each pattern of `selection.PATTERNS` and each budget b, in one block alone and in all blocks together:
 the measures of
`sparse_rows`. Blocks of 64 keep more than b.

What a block is given alone is the unchanged model's; together, every block works on what sparse ones left. Budget 1 is
the dense model bit for bit (a test holds it to that), so it costs no pass. The heads' pattern index is `pattern_index`.

Source: Nawrot et al., The Sparse Frontier (arXiv 2504.17768), there of tasks, here of the loss and of single layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, Estimate, mean_interval
from sparsecod_megatron.analysis.scores.base import Figure, HeatMap, Lines, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.attention import RowAttention, attending, check_same
from sparsecod_megatron.analysis.sparsity.pattern_index import INDEX, PatternIndex
from sparsecod_megatron.analysis.sparsity.selection import PATTERNS
from sparsecod_megatron.analysis.sparsity.sparse_rows import (
    MAX_SPARSE_SCORES,
    Measures,
    SparseAttention,
    all_sparse,
    columns,
)
from sparsecod_megatron.hf.calls import Replay, Trace

BUDGETS = (1.0, 0.5, 0.25, 0.1, 0.05)
_ADVICE = "leave sparse_attention out of --scores"
_COARSE = 1.5
"""Times the budget above which a pattern that keeps more of the keys is said to."""


class SparseAttentionScore:
    """The frontier of loss and kept keys, by pattern and by layer.

    Args:
        budgets: shares of the visible keys, falling, each above 0 and at most 1.
        max_scores: attention weights held at once.
    """

    name = "sparse_attention"

    def __init__(self, budgets: Sequence[float] = BUDGETS, max_scores: int = MAX_SPARSE_SCORES) -> None:
        self._budgets = tuple(budget for budget in budgets if budget < 1)
        self._max_scores = max_scores
        self._cells = [(pattern, budget) for pattern in PATTERNS for budget in self._budgets]

    def run(self, context: Context) -> Result:
        """Measure every pattern and budget, in each block alone and in all.

        Args:
            context: the model and the sample.

        Raises:
            ConversionError: the model's attention cannot be exchanged, or does more than its arguments say.
        """
        layers = self._layers_with_attention(context)
        passes = 2 + len(self._cells) * (1 + sum(len(context.layers) - layer for layer in layers) / len(context.layers))
        batches = self._batches(context, layers, title=f"{self.name}, {passes:.0f} passes")
        losses, alone, together, index = (column.numpy() for column in context.collect("all", batches))
        names = [f"{pattern}_{budget:g}" for pattern, budget in self._cells]
        overall = Measures(together.mean(axis=1), context.seed)  # costs of all blocks, which have as many queries
        by_layer = Measures(alone, context.seed)
        heads = mean_interval(index, seed=context.seed)
        of_heads = mean_interval(np.nanmean(index, axis=(1, 2)), seed=context.seed)
        values: dict[str, Any] = {"loss": float(losses.mean()), "passes": round(passes, 2)}
        values |= {f"loss_{name}": overall.interval("loss_increase", at).as_dict() for at, name in enumerate(names)}
        values |= {f"index_{name}": of_heads.at(at).as_dict() for at, name in enumerate(INDEX)}
        return Result(
            values=values,
            tables={
                "sparse_attention": [
                    {"pattern": pattern, "budget": budget, **overall.row(at)}
                    for at, (pattern, budget) in enumerate(self._cells)
                ],
                "sparse_attention_by_layer": [
                    {"layer": layer, "pattern": pattern, "budget": budget, **by_layer.row(place, at)}
                    for place, layer in enumerate(layers)
                    for at, (pattern, budget) in enumerate(self._cells)
                ],
                "sparse_attention_index": [
                    {"layer": layer, "head": head, **columns({name: heads.at(place, head, at) for at, name in of})}
                    for of in [list(enumerate(INDEX))]
                    for place, layer in enumerate(layers)
                    for head in range(index.shape[2])
                    if not np.isnan(index[0, place, head, 0])
                ],
            },
            per_sequence={
                f"loss_{name}": overall.per_sequence("loss_increase", at).tolist() for at, name in enumerate(names)
            },
            figures=self._figures(overall, by_layer, heads.value, layers, len(context.layers)),
            warnings=self._warnings(overall),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )

    def _layers_with_attention(self, context: Context) -> list[int]:
        attention = RowAttention(context.layers.blocks, self._max_scores)
        tokens, labels = next(iter(context.batches("all", title=self.name)))
        check_same(context, tokens, labels, attention, _ADVICE)
        return attention.layers

    @torch.no_grad()
    def _batches(self, context: Context, layers: list[int], *, title: str) -> Iterator[tuple[Tensor, ...]]:
        """Micro-batches: losses [B], costs of blocks alone and together [B, layers, cells, 7], and the index.

        The seven are the increase of the loss and `COSTS`; the index is `[B, layers, heads, 4]`, NaN where a layer has
        fewer heads than another.
        """
        replay, blocks = context.replay, context.layers.blocks
        for tokens, labels in context.batches("all", title=title):
            index = PatternIndex(blocks, self._max_scores)
            with attending(context.model, index, _ADVICE):
                replay.trace(tokens, labels)
            attention = SparseAttention(blocks, self._max_scores)
            with attending(context.model, attention, _ADVICE):
                trace = replay.trace(tokens, labels)
                losses = replay.losses(trace)
                alone = [[self._alone(replay, trace, attention, at, *cell) for cell in self._cells] for at in layers]
                together = [
                    all_sparse(replay, trace, attention, layers, PATTERNS[name], budget) for name, budget in self._cells
                ]
            costs = torch.stack([torch.stack(row, 1) for row in alone], 1), torch.stack(together, 2)
            for column in costs:
                column[..., 0] -= losses[:, None, None]
            yield losses, *costs, _padded([index.heads(layer) for layer in layers])

    def _alone(
        self, replay: Replay, trace: Trace, attention: SparseAttention, layer: int, pattern: str, budget: float
    ) -> Tensor:
        """Loss and costs with one sparse block, `[B, 7]`."""
        with attention.keeping((layer,), PATTERNS[pattern], budget):
            after = replay.run_block(trace, layer, trace.hidden[layer])
            costs = attention.costs(layer)
        losses = replay.losses_after(trace, range(layer + 1, len(trace.calls)), after)
        return torch.cat([losses[:, None], costs], 1)

    def _figures(
        self, overall: Measures, by_layer: Measures, heads: Array, layers: list[int], num_layers: int
    ) -> tuple[Figure, ...]:
        smallest = self._budgets[-1]

        def curve(measure: str, pattern: str) -> list[float | None]:
            return [overall.interval(measure, self._cells.index((pattern, budget))).value for budget in self._budgets]

        def of_layers(pattern: str) -> list[float | None]:
            at = self._cells.index((pattern, smallest))
            return [by_layer.interval("loss_increase", place, at).value for place in range(len(layers))]

        def of_heads(at: int) -> list[list[float | None]]:
            grid = np.full((num_layers, heads.shape[1]), np.nan)
            grid[layers] = heads[..., at]
            return [[None if np.isnan(value) else value for value in row] for row in grid.tolist()]

        nats, share = "nats per token above the dense model", "share of the visible keys"
        return (
            Lines(
                "sparse_attention_loss",
                "Loss when queries of all blocks keep a share of their keys",
                self._budgets,
                {pattern: curve("loss_increase", pattern) for pattern in PATTERNS},
                share,
                nats,
            ),
            Lines(
                "sparse_attention_layers",
                f"Loss when queries of one block keep {smallest:g} of their keys",
                [float(layer) for layer in layers],
                {pattern: of_layers(pattern) for pattern in PATTERNS},
                "layer",
                nats,
            ),
            HeatMap("sparse_attention_jsd", "√JSD of pooled estimate and attention", of_heads(0), "layer", "head"),
            HeatMap("sparse_attention_kept", "Share of keys of the head's pattern", of_heads(2), "layer", "head"),
        )

    def _warnings(self, overall: Measures) -> tuple[str, ...]:
        coarse = {
            f"{pattern} at budget {budget:g} keeps {kept:.2g}"
            for at, (pattern, budget) in enumerate(self._cells)
            if (kept := overall.interval("kept", at).value or 0) > _COARSE * budget
        }
        if not coarse:
            return ()
        return (
            f"{'; '.join(sorted(coarse))} of the keys, because the sequences are short: compare patterns by what they "
            "keep, or raise --seq-length",
        )


def _head_columns(heads: Estimate, place: int, head: int) -> dict[str, Any]:
    aware = heads.at(place, head, INDEX.index("query_aware")).value or 0.0
    found = columns({name: heads.at(place, head, at) for at, name in enumerate(INDEX)})
    return {"pattern": "query_aware" if aware > 0.5 else "vertical_slash", **found}


def _padded(heads: list[Tensor]) -> Tensor:
    """`[B, heads, 4]` of each layer as one tensor `[B, layers, most heads, 4]`."""
    most = max(part.shape[1] for part in heads)
    return torch.stack([F.pad(part, (0, 0, 0, most - part.shape[1]), value=torch.nan) for part in heads], 1)
