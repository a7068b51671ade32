"""Usefulness: is a block more than an affine map?

A block is replaced by the affine map that fits its own inputs and outputs best; the loss then shows the cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.affine import AffineFit, AffineMap
from sparsecod_megatron.analysis.intervals import Array, Estimate, bootstrap, finite, ratio_of_sums, wilson
from sparsecod_megatron.analysis.scores.base import Bars, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.hf.calls import Replay, Trace

THRESHOLD = 1.1
TOKENS_PER_CHANNEL = 4
"""With fewer to fit on, the map follows this sample's noise, and held-out text makes the block look useful."""


@dataclass(frozen=True)
class _Losses:
    """Held-out losses: unchanged [N], with each block replaced [N, L], and by the reference's map [N, L] or None."""

    base: Array
    affine: Array
    transposed: Array | None = None


class Usefulness:
    """`U[l] = L_lin/L`, the share of useful blocks, and the mean of `log U`."""

    name = "usefulness"

    def run(self, context: Context) -> Result:
        """Fit on one half of the sequences, score on the other."""
        maps = list(_fits(context))
        traces = context.traces("held_out", title=f"{self.name}: scoring")
        columns = context.collect("held_out", (_replaced(context, maps, trace) for trace in traces))
        losses = _Losses(*(column.numpy() for column in columns))
        return _result(self.name, context, losses)


def _fits(context: Context) -> Iterator[AffineMap]:
    """One map per block, from as many passes over the fitting half as memory for the sums makes necessary."""
    num_layers, size = len(context.layers), context.hidden_size
    at_once = max(1, int(context.memory_gib * 2**30 // (8 * 2 * size * size)))
    for start in range(0, num_layers, at_once):
        layers = range(start, min(start + at_once, num_layers))
        fits = {layer: AffineFit(size, context.device) for layer in layers}
        for trace in context.traces("fit", title="usefulness: fitting"):
            for layer, fit in fits.items():
                fit.add(*context.replay.seen(trace, layer))
        for fit in fits.values():
            fit.reduce(context.processes)
            yield fit.solve()


def _replaced(context: Context, maps: list[AffineMap], trace: Trace) -> tuple[Tensor, ...]:
    """What `_Losses` holds, for one micro-batch."""
    replay = context.replay
    kinds = [maps, [affine.transposed() for affine in maps]] if context.reference else [maps]
    replaced = [
        torch.stack([_loss_with(replay, trace, layer, affine) for layer, affine in enumerate(kind)], dim=1)
        for kind in kinds
    ]
    return (replay.losses(trace), *replaced)


def _loss_with(replay: Replay, trace: Trace, layer: int, affine: AffineMap) -> Tensor:
    """[B] losses with block `layer` replaced."""
    state, block, before = replay.layers.state, replay.layers.blocks[layer], trace.hidden[layer]
    with torch.no_grad():
        after = state.replaced(block, before, affine(state.read(block, before)))
    return replay.losses_after(trace, range(layer + 1, len(trace.calls)), after)


def _result(name: str, context: Context, losses: _Losses) -> Result:
    seed, base = context.seed, losses.base
    each = ratio_of_sums(losses.affine, base[:, None], seed=seed)

    def mean_log(weights: Array) -> Array:
        logs = np.log((weights @ losses.affine) / (weights @ base)[:, None])
        return np.stack([logs.mean(axis=1), logs[:, logs.shape[1] // 2 :].mean(axis=1)], axis=1)

    useful = int((each.value > THRESHOLD).sum())
    overall = bootstrap(mean_log, len(base), seed=seed)
    values: dict[str, Any] = {
        "useful_share": wilson(useful, len(context.layers)).as_dict(),
        "mean_log_usefulness": overall.at(0).as_dict(),
        "mean_log_usefulness_second_half": overall.at(1).as_dict(),
        "loss": finite(base.mean()),
    }
    rows = _rows(each)
    if losses.transposed is not None:
        reference = ratio_of_sums(losses.transposed, base[:, None], seed=seed).value
        values["ref_useful_share"] = finite((reference > THRESHOLD).mean())
        for row, value in zip(rows, reference.tolist(), strict=True):
            row["ref_usefulness"] = finite(value)
    intervals = [each.at(layer) for layer in range(len(rows))]
    return Result(
        values=values,
        tables={name: rows},
        per_sequence={"mean_log_usefulness": np.log(losses.affine / base[:, None]).mean(axis=1).tolist()},
        figures=(
            Bars(
                "usefulness",
                "Loss with the block replaced by its affine fit ÷ loss",
                [interval.value for interval in intervals],
                "usefulness",
                low=[interval.low for interval in intervals],
                high=[interval.high for interval in intervals],
                line=THRESHOLD,
            ),
        ),
        warnings=_warnings(context, each),
        num_sequences=len(base),
        num_tokens=len(base) * context.seq_length,
    )


def _rows(each: Estimate) -> list[dict[str, Any]]:
    rows = []
    for layer in range(len(each.value)):
        value, low, high = each.at(layer)
        useful = None if value is None else value > THRESHOLD
        rows.append({"layer": layer, "usefulness": value, "low": low, "high": high, "useful": useful})
    return rows


def _warnings(context: Context, each: Estimate) -> tuple[str, ...]:
    warnings = []
    num_tokens = len(context.part("fit")) * context.seq_length
    if num_tokens < TOKENS_PER_CHANNEL * context.hidden_size:
        warnings.append(
            f"the affine maps of {context.hidden_size} channels were fitted on only {num_tokens} tokens, which makes "
            f"blocks look useful; give at least {TOKENS_PER_CHANNEL * context.hidden_size} (half of --samples count)"
        )
    unclear = [str(layer) for layer in range(len(each.value)) if each.at(layer).contains(THRESHOLD)]
    if unclear:
        warnings.append(
            f"whether block {', '.join(unclear)} is useful (above {THRESHOLD}) cannot be told from this sample; "
            "raise --samples"
        )
    return tuple(warnings)
