"""Effective depth: how early does the model know what it will say?

The logit lens reads a prediction off the residual stream after every block, with the model's own final norm and head.
Source: nostalgebraist, "interpreting GPT: the logit lens", 2020; the thresholds are those of arXiv 2603.15389's study.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, Estimate, bootstrap, finite, mean_interval
from sparsecod_megatron.analysis.scores.base import Lines, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.hf.calls import Replay, Trace

KL_SHARE = 0.5
"""Share of the largest KL: the model has decided at the first block below it."""
OVERLAP = 0.3
TOP = 5


class Lens:
    """First block with `KL(p_l ‖ p_final)` below half its maximum, first with top-5 overlap above 0.3, as `(l+1)/L`."""

    name = "lens"

    def run(self, context: Context) -> Result:
        """Compute the curves over depth and where they cross."""
        batches = (_curves(context.replay, trace) for trace in context.traces("all", title=self.name))
        columns = (column.numpy() for column in context.collect("all", batches))
        curves = dict(zip(("kl", "top5_overlap", "residual_cosine"), columns, strict=True))
        depths = {
            "effective_depth_kl": (_kl_depth, curves["kl"]),
            "effective_depth_top5": (_overlap_depth, curves["top5_overlap"]),
            "residual_cosine_sign_change": (_sign_change, curves["residual_cosine"]),
        }
        values: dict[str, Any] = {}
        per_sequence = {}
        for name, (depth, curve) in depths.items():
            found = bootstrap(lambda w, d=depth, c=curve: d(_means(w, c)), len(curve), seed=context.seed)  # type: ignore[misc]
            values[name] = found.at().as_dict()
            per_sequence[name] = [finite(value) for value in depth(curve).tolist()]
        estimates = {name: mean_interval(curve, seed=context.seed) for name, curve in curves.items()}
        wide = [name for name, found in values.items() if found["low"] != found["high"]]
        return Result(
            values=values,
            tables={self.name: _rows(estimates)},
            per_sequence=per_sequence,
            figures=_figures(estimates),
            warnings=(
                (f"the block at which {', '.join(wide)} is reached differs between resamples; raise --samples",)
                if wide
                else ()
            ),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


@torch.no_grad()
def _curves(replay: Replay, trace: Trace) -> tuple[Tensor, Tensor, Tensor]:
    """KL to the final prediction, top-5 overlap with it, cosine of `Δ_l` and `h_l` in one micro-batch, each [B, L]."""
    final = replay.logits(trace, trace.hidden[-1])
    divergences, overlaps, cosines = [], [], []
    view = replay.layers.state.view
    for state in trace.hidden[1:]:
        early = replay.logits(trace, state)
        pairs = [_compare(row, last) for row, last in zip(early, final, strict=True)]
        divergences.append(torch.stack([pair[0] for pair in pairs]))
        overlaps.append(torch.stack([pair[1] for pair in pairs]))
    for before, after in pairwise(map(view, trace.hidden)):
        cosines.append(F.cosine_similarity((after - before).float(), before.float(), dim=-1).double().mean(dim=1))
    kl, overlap, cosine = (torch.stack(column, dim=1).cpu() for column in (divergences, overlaps, cosines))
    return kl, overlap, cosine


def _compare(early: Tensor, final: Tensor) -> tuple[Tensor, Tensor]:
    """Means over tokens of KL in nats and of the shared part of the top 5, for logits [T, V] of one sequence."""
    early_log, final_log = F.log_softmax(early.float(), dim=-1), F.log_softmax(final.float(), dim=-1)
    divergence = (early_log.exp() * (early_log - final_log)).sum(dim=-1).double().mean()
    top = min(TOP, early.shape[-1])
    first, second = early.topk(top, dim=-1).indices, final.topk(top, dim=-1).indices
    shared = (first[:, :, None] == second[:, None, :]).any(dim=-1).double().mean()
    return divergence, shared


def _means(weights: Array, curve: Array) -> Array:
    mean: Array = (weights @ curve) / weights.sum(axis=1, keepdims=True)
    return mean


def _kl_depth(curve: Array) -> Array:
    return _first(curve < KL_SHARE * curve.max(axis=-1, keepdims=True))


def _overlap_depth(curve: Array) -> Array:
    return _first(curve > OVERLAP)


def _sign_change(curve: Array) -> Array:
    """The first block whose output's cosine has another sign than the block before's."""
    signs = np.sign(curve)
    changes = signs[..., 1:] * signs[..., :-1] < 0
    return _first(np.concatenate([np.zeros_like(changes[..., :1], shape=(*curve.shape[:-1], 1)), changes], axis=-1))


def _first(reached: np.ndarray[Any, np.dtype[np.bool_]]) -> Array:
    """[..., L] → `(l+1)/L` of the first true one, NaN where none is."""
    depth = (reached.argmax(axis=-1) + 1) / reached.shape[-1]
    return np.where(reached.any(axis=-1), depth, np.nan)


def _rows(estimates: dict[str, Estimate]) -> list[dict[str, Any]]:
    rows = []
    for layer in range(len(estimates["kl"].value)):
        row: dict[str, Any] = {"layer": layer}
        for name, estimate in estimates.items():
            value, low, high = estimate.at(layer)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def _figures(estimates: dict[str, Estimate]) -> tuple[Lines, ...]:
    layers = list(range(len(estimates["kl"].value)))

    def curve(name: str, title: str, key: str, label: str, line: float) -> Lines:
        values = [finite(value) for value in estimates[key].value.tolist()]
        return Lines(name, title, layers, {key: values}, "layer", label, line)

    half = KL_SHARE * float(estimates["kl"].value.max())
    return (
        curve("effective_depth", "What is left to decide after each block", "kl", "KL(p_l ‖ p_final), nats", half),
        curve("top5_overlap", "Top 5 shared with the final prediction", "top5_overlap", "share", OVERLAP),
        curve("residual_cosine", "Cosine of a block's output with its input", "residual_cosine", "cosine", 0.0),
    )
