"""Permutation: what does the loss say when two blocks trade places?"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Z_95, Array, Interval, bootstrap, finite, ratio_of_sums
from sparsecod_megatron.analysis.scores.base import HeatMap, Number, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.scores.pairs import Pairs, Wanted, choose_pairs
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.hf.calls import Replay, Trace


class Permutation:
    """`P[i,j]`, signed; each swap starts at the lower of its two blocks.

    Args:
        pairs: how many to sample of all, `adjacent` for neighbours alone, None for all.
    """

    name = "permutation"

    def __init__(self, *, pairs: Wanted = None) -> None:
        self._wanted = pairs

    def run(self, context: Context) -> Result:
        """Compute the pairs, the signed mean, and the reference's mean of absolute values.

        Raises:
            ConfigError: a model of one block.
        """
        num_layers = len(context.layers)
        if num_layers < 2:
            raise ConfigError("--scores permutation: the model has one block, so there is no pair; leave it out")
        chosen = choose_pairs(num_layers, self._wanted, seed=context.seed)
        pairs = chosen.swaps
        batches = (_swaps(context.replay, trace, pairs) for trace in context.traces("all", title=self.name))
        base, swapped = (column.numpy() for column in context.collect("all", batches))
        change = swapped - base[:, None]

        def means(weights: Array) -> Array:
            relative = (weights @ change) / (weights @ base)[:, None]
            return np.stack([relative @ chosen.weights, np.abs(relative) @ chosen.weights], axis=1)

        overall = bootstrap(means, len(base), seed=context.seed)
        each = ratio_of_sums(change, base[:, None], seed=context.seed)
        intervals = [each.at(index) for index in range(len(pairs))]
        undecided = sum(interval.contains(0.0) for interval in intervals)
        shown: list[list[Number]] = [[None] * num_layers for _ in range(num_layers)]
        for (lower, upper), interval in zip(pairs, intervals, strict=True):
            shown[lower][upper] = shown[upper][lower] = interval.value
        suffix = "_adjacent" if chosen.are_adjacent else ""
        return Result(
            values={
                f"permutation{suffix}": _with_sampling(overall.at(0), chosen, each.value).as_dict(),
                f"ref_permutation{suffix}": _with_sampling(overall.at(1), chosen, np.abs(each.value)).as_dict(),
                "pairs": len(pairs),
                "loss": finite(base.mean()),
            },
            tables={
                self.name: [
                    {"first": lower, "second": upper, "permutation": value, "low": low, "high": high}
                    | {"ref_permutation": None if value is None else abs(value)}
                    for (lower, upper), (value, low, high) in zip(pairs, intervals, strict=True)
                ]
            },
            per_sequence={f"permutation{suffix}": (change / base[:, None] @ chosen.weights).tolist()},
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
            warnings=_warnings(undecided, chosen),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


def _with_sampling(interval: Interval, chosen: Pairs, values: Array) -> Interval:
    """The interval over sequences, wider by what the choice of pairs leaves open."""
    value, low, high = interval
    if value is None or low is None or high is None:
        return interval
    spread = Z_95**2 * chosen.sampling_variance(values)
    return Interval(
        value, value - math.sqrt((value - low) ** 2 + spread), value + math.sqrt((high - value) ** 2 + spread)
    )


def _warnings(undecided: int, chosen: Pairs) -> tuple[str, ...]:
    warnings = []
    if undecided:
        warnings.append(
            f"{undecided} of {len(chosen.swaps)} swaps change the loss by less than this sample can tell from zero; "
            "raise --samples"
        )
    if chosen.sampled_of is not None:
        warnings.append(
            f"{len(chosen.swaps)} of {chosen.sampled_of} pairs were swapped; the intervals of the means include what "
            "this leaves open"
        )
    return tuple(warnings)


def _swaps(replay: Replay, trace: Trace, pairs: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Losses of one micro-batch: [B] unchanged and [B, pairs] with the pair swapped."""
    num_layers = len(trace.calls)
    losses = []
    for lower, upper in pairs:
        order = [upper, *range(lower + 1, upper), lower, *range(upper + 1, num_layers)]
        with replay.layers.state.traded(replay.layers.blocks[lower], replay.layers.blocks[upper]):
            losses.append(replay.losses_after(trace, order, trace.hidden[lower]))
    return replay.losses(trace), torch.stack(losses, dim=1)
