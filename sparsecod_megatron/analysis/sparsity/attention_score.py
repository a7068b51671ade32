"""The `attention` score: how few keys each head's rows rest on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.branches import TOLERANCE, branch_error
from sparsecod_megatron.analysis.foreign import running
from sparsecod_megatron.analysis.intervals import Estimate, mean_interval
from sparsecod_megatron.analysis.layers import hidden_output
from sparsecod_megatron.analysis.scores.base import HeatMap, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.attention import MAX_SCORES, RowRecorder, recording
from sparsecod_megatron.analysis.sparsity.attention_rows import STATISTICS
from sparsecod_megatron.errors import ConversionError


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
    recorder = RowRecorder(context.layers.blocks, max_scores)
    advice = "leave attention out of --scores"
    for index, (tokens, labels) in enumerate(context.batches("all", title="attention")):
        tokens = tokens.to(context.device)
        if index == 0:
            _check_same(context, tokens, labels, max_scores)
        with recording(context.model, recorder), running(context.model, "a pass with attention exchanged", advice):
            context.model(input_ids=tokens, use_cache=False)
        if not recorder.layers():
            raise ConversionError(f"{type(context.model).__name__}: no block calls an attention; {advice}")
    return {layer: torch.cat(context.processes.gather([rows])) for layer, rows in recorder.layers().items()}


def _check_same(context: Context, tokens: Tensor, labels: Tensor, max_scores: int) -> None:
    """Every attention must give with our function what it gives with its own, for the same input of its block.

    Not the block or the loss: what follows attention may hide a difference, and a router makes one of rounding.
    """
    replay, recorder = context.replay, RowRecorder(context.layers.blocks, max_scores)
    with recording(context.model, recorder):
        calls = replay.trace(tokens, labels)  # with the masks that the recorder reads
    modules = {layer: recorder.modules(layer) for layer in recorder.layers()}
    with _outputs([module for found in modules.values() for module in found]) as own:
        hidden = replay.trace(tokens, labels).hidden
    for layer, found in modules.items():
        with recording(context.model, recorder), _outputs(found) as ours:
            replay.run_block(calls, layer, hidden[layer])
        for module in found:
            error = branch_error(torch.zeros_like(own[module]), own[module], ours[module])
            if not error <= TOLERANCE[context.dtype]:
                raise ConversionError(
                    f"{type(module).__name__} of block {layer}: recomputed, it gives other outputs (relative "
                    f"difference {error:.1e}), so it does more than scores, mask and softmax; leave "
                    "attention out of --scores"
                )


@contextmanager
def _outputs(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """What the modules put out while the `with` block runs, by module."""
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        after = hidden_output(output)
        assert after is not None
        found[module] = after

    handles = [module.register_forward_hook(note) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


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
