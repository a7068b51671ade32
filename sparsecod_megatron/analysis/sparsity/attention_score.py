"""The `attention` score: how few keys each head's rows rest on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.intervals import Estimate, mean_interval
from sparsecod_megatron.analysis.scores.base import HeatMap, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.attention import MAX_SCORES, Call, RowAttention, attending, check_same
from sparsecod_megatron.analysis.sparsity.attention_rows import STATISTICS, row_statistics
from sparsecod_megatron.hf.foreign import running

_ADVICE = "leave attention out of --scores"


class Attention:
    """Mean row statistics of every head, with intervals over sequences.

    Args:
        max_scores: attention weights held at once.
    """

    name = "attention"

    def __init__(self, max_scores: int = MAX_SCORES) -> None:
        self._max_scores = max_scores

    def run(self, context: Context) -> Result:
        """Run the sample once through an attention that keeps count.

        Args:
            context: the model and the sample.

        Raises:
            ConversionError: the model's attention cannot be exchanged, or does more than its arguments say.
        """
        layers = record_rows(context, self._max_scores)
        estimates = {layer: mean_interval(rows.double().numpy(), seed=context.seed) for layer, rows in layers.items()}
        per_sequence = torch.stack([rows.mean(1) for rows in layers.values()]).mean(0).double()  # [N, statistics]
        overall = mean_interval(per_sequence.numpy(), seed=context.seed)
        return Result(
            values={name: overall.at(index).as_dict() for index, name in enumerate(STATISTICS)},
            tables={
                "attention": [row for layer, estimate in estimates.items() for row in _head_rows(layer, estimate)],
                "attention_by_layer": [
                    {"layer": layer, **_columns(mean_interval(rows.mean(1).double().numpy(), seed=context.seed))}
                    for layer, rows in layers.items()
                ],
            },
            per_sequence={name: per_sequence[:, index].tolist() for index, name in enumerate(STATISTICS)},
            figures=_figures(estimates, len(context.layers)),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


class RowRecorder(RowAttention):
    """The model's own attention, which records the mean row statistics of every layer, sequence and head."""

    def __init__(self, blocks: Iterable[nn.Module], max_scores: int = MAX_SCORES) -> None:
        super().__init__(blocks, max_scores)
        self._rows: dict[int, dict[nn.Module, list[Tensor]]] = {}  # a block may have several attentions

    def rows(
        self, layer: int | None, module: nn.Module, call: Call, part: slice, scores: Tensor, values: Tensor
    ) -> Tensor:
        """See `RowAttention`."""
        weights, num_queries = call.softmax(scores), call.query.shape[2]
        if layer is not None:
            found = self._rows.setdefault(layer, {}).setdefault(module, [])
            if part.start == 0:
                found.append(torch.zeros(*weights.shape[:2], len(STATISTICS)))
            total = row_statistics(weights, call.visible(part).sum(-1), part.start, num_queries).sum(2)
            found[-1] += (total / num_queries).cpu()
        return weights @ values

    def means(self) -> dict[int, Tensor]:
        """Over each sequence's queries, by layer: `[sequences, heads, statistics]`, heads of all attentions."""
        return {
            layer: torch.cat([torch.cat(rows) for rows in modules.values()], dim=1)
            for layer, modules in sorted(self._rows.items())
        }


@torch.no_grad()
def record_rows(context: Context, max_scores: int) -> dict[int, Tensor]:
    """Statistics of every layer, each sequence and head averaged over its queries.

    Args:
        context: the model and the sample.
        max_scores: attention weights held at once.

    Returns:
        Layer → `[sequences, heads, statistics]`; layers without attention are absent.

    Raises:
        ConversionError: as in `Attention.run`.
    """
    blocks = context.layers.blocks
    recorder = RowRecorder(blocks, max_scores)
    for index, (tokens, labels) in enumerate(context.batches("all", title="attention")):
        if index == 0:
            check_same(context, tokens, labels, RowAttention(blocks, max_scores), _ADVICE)
        doing = running(context.model, "a pass with attention exchanged", _ADVICE)
        with attending(context.model, recorder, _ADVICE), doing:
            context.model(input_ids=tokens.to(context.device), use_cache=False)
    return {layer: torch.cat(context.processes.gather([rows])) for layer, rows in recorder.means().items()}


def _columns(estimate: Estimate, *index: int) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for position, name in enumerate(STATISTICS):
        interval = estimate.at(*index, position)
        columns |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return columns


def _head_rows(layer: int, estimate: Estimate) -> list[dict[str, Any]]:
    return [{"layer": layer, "head": head, **_columns(estimate, head)} for head in range(len(estimate.value))]


def _figures(estimates: dict[int, Estimate], num_layers: int) -> tuple[HeatMap, ...]:
    titles = {"sink": "Mass of the first token", "entropy": "Entropy ÷ log T", "keys_95": "Keys for 95 % of the mass"}
    num_heads = max(len(estimate.value) for estimate in estimates.values())

    def rows(position: int) -> list[list[float | None]]:
        grid = np.full((num_layers, num_heads), np.nan)
        for layer, estimate in estimates.items():
            grid[layer, : len(estimate.value)] = estimate.value[:, position]
        return [[None if math.isnan(value) else value for value in row] for row in grid.tolist()]

    return tuple(
        HeatMap(f"attention_{name}", title, rows(STATISTICS.index(name)), "layer", "head")
        for name, title in titles.items()
    )
