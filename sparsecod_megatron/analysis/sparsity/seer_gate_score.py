"""The `seer_gate` score: how well a learned gate knows the blocks of keys that a model will attend to.

Gates (`seer_gate`) are trained on the first half of the sample, the model frozen. On the other half all blocks then
keep a share of their keys, chosen by the gates, and by the blocks' true mass (`block_64`, the oracle), with the
measures of `sparse_rows`. Both always keep the query's own block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.scores.base import Lines, Result
from sparsecod_megatron.analysis.scores.context import Context, Part
from sparsecod_megatron.analysis.sparsity.attention import RowAttention, attending, check_same
from sparsecod_megatron.analysis.sparsity.seer_gate import (
    Features,
    Gate,
    GateFeatures,
    GatePattern,
    divergence,
    train_gates,
)
from sparsecod_megatron.analysis.sparsity.selection import BLOCK, Pattern, block_64
from sparsecod_megatron.analysis.sparsity.sparse_attention_score import BUDGETS
from sparsecod_megatron.analysis.sparsity.sparse_rows import MAX_SPARSE_SCORES, Measures, SparseAttention, all_sparse
from sparsecod_megatron.errors import ConfigError

STEPS = 300
_ADVICE = "leave seer_gate out of --scores"


class SeerGate:
    """Recall and loss of the gates' choice beside the oracle's, and the gates' divergence from their target.

    Args:
        budgets: shares of the visible keys, falling, each above 0 and at most 1.
        steps: of training.
        max_scores: attention weights held at once.
    """

    name = "seer_gate"

    def __init__(
        self, budgets: Sequence[float] = BUDGETS, steps: int = STEPS, max_scores: int = MAX_SPARSE_SCORES
    ) -> None:
        self._budgets = tuple(budget for budget in budgets if budget < 1)
        self._steps, self._max_scores = steps, max_scores

    def run(self, context: Context) -> Result:
        """Train, then measure.

        Args:
            context: the model and the sample.

        Raises:
            ConfigError: sequences without an earlier block, or a sample that has no two halves.
            ConversionError: the model's attention cannot be exchanged, or does more than its arguments say.
        """
        if context.seq_length <= BLOCK:
            raise ConfigError(
                f"--seq-length {context.seq_length}: seer_gate tells blocks of {BLOCK} tokens apart; give {4 * BLOCK} "
                f"or more, or {_ADVICE}"
            )
        attention = RowAttention(context.layers.blocks, self._max_scores)
        check_same(context, *next(iter(context.batches("fit", title=self.name))), attention, _ADVICE)
        places = [(layer, module) for layer in attention.layers for module in attention.modules(layer)]
        modules = [module for _, module in places]
        fit, held_out = (self._features(context, part, modules) for part in ("fit", "held_out"))
        gates = train_gates(fit, context.seq_length, steps=self._steps, seed=context.seed)
        patterns: dict[str, Pattern] = {"gate": GatePattern(dict(zip(modules, gates, strict=True))), "oracle": block_64}
        cells = [(name, budget) for name in patterns for budget in self._budgets]
        batches = self._batches(context, attention.layers, patterns)
        losses, sums = (column.numpy() for column in context.collect("held_out", batches))
        kl = _divergences(gates, fit, held_out, context.seq_length)
        overall, by_layer = Measures(sums.mean(axis=1), context.seed), Measures(sums, context.seed)
        values: dict[str, Any] = {"loss": float(losses.mean())}
        values |= {name: sum(row[name] for row in kl) / len(kl) for name in kl[0]}
        for at, (name, budget) in enumerate(cells):
            for measure, short in (("loss_increase", "loss"), ("recall", "recall"), ("kept", "kept")):
                values[f"{short}_{name}_{budget:g}"] = overall.interval(measure, at).as_dict()
        return Result(
            values=values,
            tables={
                "seer_gate": [
                    {"pattern": name, "budget": budget, **overall.row(at)} for at, (name, budget) in enumerate(cells)
                ],
                "seer_gate_by_layer": [
                    {"layer": layer, "pattern": name, "budget": budget, **by_layer.row(place, at)}
                    for place, layer in enumerate(attention.layers)
                    for at, (name, budget) in enumerate(cells)
                ],
                "seer_gate_training": [
                    {"layer": layer, "attention": place, **row}
                    for place, ((layer, _), row) in enumerate(zip(places, kl, strict=True))
                ],
            },
            per_sequence={
                f"loss_{name}_{budget:g}": overall.per_sequence("loss_increase", at).tolist()
                for at, (name, budget) in enumerate(cells)
            },
            figures=(self._figure(overall, cells),),
            num_sequences=len(losses),
            num_tokens=len(losses) * context.seq_length,
        )

    def _figure(self, overall: Measures, cells: list[tuple[str, float]]) -> Lines:
        series: dict[str, list[float | None]] = {}
        for at, (name, _) in enumerate(cells):
            series.setdefault(name, []).append(overall.interval("recall", at).value)
        title, axes = "Attention mass in the kept blocks", ("share of the visible keys", "recall")
        return Lines("seer_gate_recall", title, self._budgets, dict(series), *axes)

    @torch.no_grad()
    def _features(self, context: Context, part: Part, modules: list[nn.Module]) -> list[Features]:
        """Those of each attention, for all sequences of a part of the sample, on the model's device."""

        def batches() -> Iterator[tuple[Tensor, ...]]:
            for tokens, labels in context.batches(part, title=f"{self.name}, features"):
                features = GateFeatures(context.layers.blocks, self._max_scores)
                with attending(context.model, features, _ADVICE):
                    context.replay.trace(tokens, labels)
                yield tuple(column for module in modules for column in features.found[module])

        columns = [column.to(context.device) for column in context.collect(part, batches())]
        return [Features(*columns[at : at + 3]) for at in range(0, len(columns), 3)]

    @torch.no_grad()
    def _batches(
        self, context: Context, layers: list[int], patterns: dict[str, Pattern]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Micro-batches held out: losses [B], and increase of the loss and costs [B, layers, cells, 7]."""
        replay = context.replay
        for tokens, labels in context.batches("held_out", title=self.name):
            attention = SparseAttention(context.layers.blocks, self._max_scores)
            with attending(context.model, attention, _ADVICE):
                trace = replay.trace(tokens, labels)
                losses = replay.losses(trace)
                cells = [
                    all_sparse(replay, trace, attention, layers, pattern, budget)
                    for pattern in patterns.values()
                    for budget in self._budgets
                ]
            sums = torch.stack(cells, 2)
            sums[..., 0] -= losses[:, None, None]
            yield losses, sums


@torch.no_grad()
def _divergences(
    gates: list[Gate], fit: list[Features], held_out: list[Features], length: int
) -> list[dict[str, float]]:
    """Each attention's: on what its gate was trained on, on the other half, and there of an even guess."""
    return [
        {
            "kl_fit": float(divergence(gate, trained, length)),
            "kl_held_out": float(divergence(gate, other, length)),
            "kl_even": float(divergence(None, other, length)),
        }
        for gate, trained, other in zip(gates, fit, held_out, strict=True)
    ]
