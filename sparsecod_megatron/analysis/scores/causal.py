"""Causal effect: how much does a later block change what it writes when an earlier block is skipped?

Source: R. Csordás, C. D. Manning, C. Potts, "Do Language Models Use Their Depth Efficiently?", arXiv 2505.13898.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, Estimate, bootstrap, finite, ratio_of_sums
from sparsecod_megatron.analysis.scores.base import HeatMap, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.hf.calls import Replay, Trace


class Causal:
    """`C[s,l]` for every pair `l > s`; skipping `s` starts at `h_s`, so half of all blocks run at all."""

    name = "causal"

    def run(self, context: Context) -> Result:
        """Compute the matrix, its maximum over tokens, and the mean over pairs."""
        num_layers = len(context.layers)
        if num_layers < 2:
            raise ConfigError("--scores causal: the model has one block, so none comes after another; leave it out")
        batches = (_effects(context.replay, trace) for trace in context.traces("all", title=self.name))
        change, size, largest = (column.numpy() for column in context.collect("all", batches))
        seed = context.seed
        pairs = ratio_of_sums(change, size[:, None, :], seed=seed)
        upper = np.triu_indices(num_layers, k=1)

        late = upper[0] >= num_layers // 2

        def mean_of_pairs(weights: Array) -> Array:
            below = weights @ size
            above = np.einsum("rn,nsl->rsl", weights, change)
            pairs = _divide(above, below[:, None, :])[:, upper[0], upper[1]]
            return np.stack([_mean_of_valid(pairs), _mean_of_valid(pairs[:, late])], axis=1)

        overall = bootstrap(mean_of_pairs, len(size), seed=seed)
        of_sequence = _mean_of_valid(_divide(change, size[:, None, :])[:, upper[0], upper[1]])
        maximum = _maximum(largest)
        return Result(
            values={
                "causal": overall.at(0).as_dict(),
                "causal_second_half": overall.at(1).as_dict(),
                "causal_max": finite(float(_mean_of_valid(maximum[upper]))),
            },
            tables={self.name: _rows(pairs, maximum, upper)},
            per_sequence={"causal": [finite(value) for value in of_sequence.tolist()]},
            figures=(
                _heat_map("causal", "Change of a later block's output when a block is skipped", pairs.value),
                _heat_map("causal_max", "The same at the token that changes most", maximum),
            ),
            warnings=_warnings(pairs, upper),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


@torch.no_grad()
def _effects(replay: Replay, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over one micro-batch: Σ_tokens ‖Δ'−Δ‖ [B, L, L], Σ_tokens ‖Δ‖ [B, L], max_tokens ‖Δ'−Δ‖/‖Δ‖ [B, L, L].

    The maximum leaves out tokens whose Δ is zero, and is NaN where all are.
    """
    num_layers, batch = len(trace.calls), len(trace.tokens)
    deltas = [_written(replay, trace, layer) for layer in range(num_layers)]
    sizes = [delta.norm(dim=-1) for delta in deltas]
    change = torch.zeros(batch, num_layers, num_layers, dtype=torch.float64)
    largest = torch.full((batch, num_layers, num_layers), torch.nan, dtype=torch.float64)
    for skipped in range(num_layers - 1):
        before = trace.hidden[skipped]
        for layer in range(skipped + 1, num_layers):
            after, written = replay.step(trace, layer, before)
            moved = (written.float() - deltas[layer]).norm(dim=-1)
            change[:, skipped, layer] = moved.double().sum(dim=1).cpu()
            relative = torch.where(sizes[layer] > 0, moved / sizes[layer], -torch.inf)
            highest = relative.amax(dim=1).double()
            largest[:, skipped, layer] = torch.where(highest >= 0, highest, torch.nan).cpu()
            before = after
    return change, torch.stack([size.double().sum(dim=1) for size in sizes], dim=1).cpu(), largest


def _written(replay: Replay, trace: Trace, layer: int) -> Tensor:
    """What a block writes in the unchanged model: the states say it, unless they hold more than the stream."""
    if replay.layers.state.columns == 1:
        return (trace.hidden[layer + 1] - trace.hidden[layer]).float()
    return replay.step(trace, layer, trace.hidden[layer])[1].float()


def _divide(above: Array, below: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        quotient: Array = above / below
    return np.where(np.isfinite(quotient), quotient, np.nan)


def _mean_of_valid(values: Array) -> Array:
    """Mean over the last axis of what is a number; NaN where nothing is."""
    valid = np.isfinite(values)
    return _divide(np.where(valid, values, 0.0).sum(axis=-1), valid.sum(axis=-1).astype(np.float64))


def _maximum(largest: Array) -> Array:
    """Over sequences, NaN only where every sequence has none: [N, L, L] → [L, L]."""
    highest = np.where(np.isnan(largest), -np.inf, largest).max(axis=0)
    return np.where(np.isinf(highest), np.nan, highest)


def _rows(pairs: Estimate, maximum: Array, upper: tuple[Any, Any]) -> list[dict[str, Any]]:
    rows = []
    for skipped, layer in zip(*(axis.tolist() for axis in upper), strict=True):
        value, low, high = pairs.at(skipped, layer)
        row = {"skipped": skipped, "layer": layer, "causal": value, "low": low, "high": high}
        rows.append(row | {"max": finite(maximum[skipped, layer])})
    return rows


def _heat_map(name: str, title: str, values: Array) -> HeatMap:
    shown = [
        [finite(value) if layer > row else None for layer, value in enumerate(line)]
        for row, line in enumerate(values.tolist())
    ]
    return HeatMap(name, title, shown, row_label="skipped block", column_label="later block")


def _warnings(pairs: Estimate, upper: tuple[Any, Any]) -> tuple[str, ...]:
    undefined = int(np.isnan(pairs.value[upper]).sum())
    if not undefined:
        return ()
    return (f"{undefined} pairs have no causal effect defined: the later block adds nothing to the residual stream",)
