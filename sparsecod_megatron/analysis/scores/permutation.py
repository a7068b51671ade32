"""Permutation: what does the loss say when two blocks trade places?"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, bootstrap, finite, ratio_of_sums
from sparsecod_megatron.analysis.scores.base import HeatMap, Number, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.trace import Replay, Trace
from sparsecod_megatron.errors import ConfigError


class Permutation:
    """`P[i,j]`, signed; each swap starts at the lower of its two blocks."""

    name = "permutation"

    def run(self, context: Context) -> Result:
        """Compute every pair, the signed mean, and the reference's mean of absolute values."""
        num_layers = len(context.layers)
        if num_layers < 2:
            raise ConfigError("--scores permutation: the model has one block, so there is no pair; leave it out")
        pairs = list(combinations(range(num_layers), 2))
        batches = (_swaps(context.replay, trace, pairs) for trace in context.traces("all", title=self.name))
        base, swapped = (column.numpy() for column in context.collect("all", batches))
        change = swapped - base[:, None]

        def means(weights: Array) -> Array:
            relative = (weights @ change) / (weights @ base)[:, None]
            return np.stack([relative.mean(axis=1), np.abs(relative).mean(axis=1)], axis=1)

        overall = bootstrap(means, len(base), seed=context.seed)
        each = ratio_of_sums(change, base[:, None], seed=context.seed)
        intervals = [each.at(index) for index in range(len(pairs))]
        undecided = sum(interval.contains(0.0) for interval in intervals)
        shown: list[list[Number]] = [[None] * num_layers for _ in range(num_layers)]
        for (lower, upper), interval in zip(pairs, intervals, strict=True):
            shown[lower][upper] = shown[upper][lower] = interval.value
        return Result(
            values={
                "permutation": overall.at(0).as_dict(),
                "ref_permutation": overall.at(1).as_dict(),
                "loss": finite(base.mean()),
            },
            tables={
                self.name: [
                    {"first": lower, "second": upper, "permutation": value, "low": low, "high": high}
                    | {"ref_permutation": None if value is None else abs(value)}
                    for (lower, upper), (value, low, high) in zip(pairs, intervals, strict=True)
                ]
            },
            per_sequence={"permutation": (change / base[:, None]).mean(axis=1).tolist()},
            figures=(
                HeatMap(
                    "permutation",
                    "Relative change of the loss when two blocks trade places",
                    shown,
                    row_label="block",
                    column_label="block",
                    diverging=True,
                ),
            ),
            warnings=(
                (
                    f"{undecided} of {len(pairs)} swaps change the loss by less than this sample can tell from zero; "
                    "raise --samples",
                )
                if undecided
                else ()
            ),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


def _swaps(replay: Replay, trace: Trace, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Losses of one micro-batch: [B] unchanged and [B, pairs] with the pair swapped."""
    num_layers = len(trace.calls)
    losses = []
    for lower, upper in pairs:
        order = [upper, *range(lower + 1, upper), lower, *range(upper + 1, num_layers)]
        losses.append(replay.losses_after(trace, order, trace.hidden[lower]))
    return replay.losses(trace), torch.stack(losses, dim=1)
