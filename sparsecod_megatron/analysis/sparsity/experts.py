"""The `experts` score: how a mixture uses its experts, which of them the model would miss, and which work together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sparsecod_megatron.analysis.intervals import Estimate, mean_interval, ratio_of_sums
from sparsecod_megatron.analysis.scores.base import HeatMap, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.routing import ExpertLayer, find_experts, watching
from sparsecod_megatron.parallel.processes import Processes


class Choices:
    """Counts of one mixture's choices.

    Args:
        num_experts: E.
        seq_length: tokens of a sequence.
    """

    def __init__(self, num_experts: int, seq_length: int) -> None:
        self._num_experts = num_experts
        self._seq_length = seq_length
        self._slots: list[Tensor] = []
        self.together = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.num_tokens = 0

    def __call__(self, index: Tensor) -> None:
        """Count the chosen experts of a micro-batch, `[tokens, k]`."""
        chosen = F.one_hot(index.cpu().clamp(max=self._num_experts), self._num_experts + 1)
        used = chosen.sum(1)[:, : self._num_experts].double()
        self._slots.append(used.view(-1, self._seq_length, self._num_experts).sum(1))
        self.together += used.t() @ used
        self.num_tokens += len(used)

    def reduce(self, processes: Processes) -> None:
        """Count the choices of all processes. Collective over them."""
        self._slots = processes.gather(self._slots)
        self.together = processes.total(self.together)
        self.num_tokens = int(processes.total(torch.tensor(self.num_tokens)))

    @property
    def slots(self) -> Tensor:
        """Routed slots by expert, `[sequences, experts]`."""
        return torch.cat(self._slots)


class Experts:
    """Utilisation, importance and co-activation of every routed expert."""

    name = "experts"

    def run(self, context: Context) -> Result:
        """Watch the router on the sample, and run it again from each mixture without each of its experts.

        An expert's importance is the loss without its output minus the loss with it, in nats: tokens are still routed
        to it, its share is lost, and the others keep their weights. An expert that no token of a micro-batch is routed
        to changes nothing there and costs no pass.

        Args:
            context: the model and the sample.

        Raises:
            ConversionError: a model without routed experts.
        """
        layers = find_experts(context.layers.blocks)
        choices = [Choices(found.num_experts, context.seq_length) for found in layers]
        increases = _measure(context, layers, choices)
        usage = [_usage(found, context.seed) for found in choices]
        importance = [mean_interval(found.numpy(), seed=context.seed) for found in increases]
        rows = _rows(layers, usage, importance)
        dead = sum(row["utilisation"] == 0 for row in rows)
        entropies = [_entropy(found.value) for found in usage]
        return Result(
            values={
                "num_mixtures": len(layers),
                "dead_experts": dead,
                "load_entropy": sum(entropies) / len(entropies),
                "max_over_mean_load": max(float(found.value.max() * len(found.value)) for found in usage),
                "importance_mean": float(np.mean([found.value.mean() for found in importance])),
                "importance_max": max(float(found.value.max()) for found in importance),
            },
            tables={
                "experts": rows,
                "experts_by_layer": [
                    {"layer": layer.layer, "name": layer.name, "load_entropy": entropy}
                    for layer, entropy in zip(layers, entropies, strict=True)
                ],
                "experts_coactivation": _pairs(layers, choices),
            },
            figures=_figures(layers, usage, importance, choices),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


@torch.no_grad()
def _measure(context: Context, layers: Sequence[ExpertLayer], choices: Sequence[Choices]) -> list[Tensor]:
    """Fill the choices; loss increases `[sequences, experts]` of each mixture, all of all processes."""
    replay, num_blocks = context.replay, len(context.layers)
    increases: list[list[Tensor]] = [[] for _ in layers]
    total = len(context.own("all")) * sum(layer.num_experts for layer in layers)
    with tqdm(total=total, desc="experts", unit="removal", leave=False, disable=context.processes.no_progress) as bar:
        for tokens, labels in context.batches("all", title="experts"):
            with watching(layers, choices):
                trace = replay.trace(tokens, labels)
            whole = replay.losses(trace)
            for layer, found, parts in zip(layers, choices, increases, strict=True):
                used = found.slots[-len(tokens) :].sum(0)
                part = torch.zeros(len(tokens), layer.num_experts, dtype=torch.float64)
                for expert in used.nonzero().flatten().tolist():
                    with layer.without(expert):
                        losses = replay.losses_after(trace, range(layer.layer, num_blocks), trace.hidden[layer.layer])
                    part[:, expert] = losses - whole
                parts.append(part)
                bar.update(len(tokens) * layer.num_experts)
    for found in choices:
        found.reduce(context.processes)
    return [torch.cat(context.processes.gather(parts)) for parts in increases]


def _usage(choices: Choices, seed: int) -> Estimate:
    """Share of routed slots, `[experts]`."""
    slots = choices.slots.numpy()
    return ratio_of_sums(slots, slots.sum(1, keepdims=True), seed=seed)


def _entropy(shares: Any) -> float:
    """Entropy ÷ log E."""
    used = shares[shares > 0]
    return float(-(used * np.log(used)).sum() / math.log(max(2, len(shares))))


def _rows(
    layers: Sequence[ExpertLayer], usage: Sequence[Estimate], importance: Sequence[Estimate]
) -> list[dict[str, Any]]:
    rows = []
    for layer, used, missed in zip(layers, usage, importance, strict=True):
        for expert in range(layer.num_experts):
            share, increase = used.at(expert), missed.at(expert)
            rows.append(
                {
                    "layer": layer.layer,
                    "name": layer.name,
                    "expert": expert,
                    "utilisation": share.value,
                    "utilisation_low": share.low,
                    "utilisation_high": share.high,
                    "importance": increase.value,
                    "importance_low": increase.low,
                    "importance_high": increase.high,
                }
            )
    return rows


def _pairs(layers: Sequence[ExpertLayer], choices: Sequence[Choices]) -> list[dict[str, Any]]:
    """Pairs of experts that share a token: how often, and how much oftener than if chosen independently."""
    rows = []
    for layer, found in zip(layers, choices, strict=True):
        share = found.together / found.num_tokens
        alone = share.diagonal()
        for first, second in share.triu(1).nonzero().tolist():
            together = float(share[first, second])
            rows.append(
                {
                    "layer": layer.layer,
                    "name": layer.name,
                    "expert": first,
                    "other": second,
                    "token_share": together,
                    "lift": together / float(alone[first] * alone[second]),
                }
            )
    return rows


def _figures(
    layers: Sequence[ExpertLayer],
    usage: Sequence[Estimate],
    importance: Sequence[Estimate],
    choices: Sequence[Choices],
) -> tuple[HeatMap, ...]:
    widest = max(layer.num_experts for layer in layers)

    def grid(estimates: Sequence[Estimate]) -> list[list[float | None]]:
        return [[*found.value.tolist(), *[None] * (widest - len(found.value))] for found in estimates]

    shown = sorted({0, len(layers) // 2, len(layers) - 1})
    together = tuple(
        HeatMap(
            f"experts_coactivation_{layers[index].layer:03d}",
            f"Tokens shared by two experts, block {layers[index].layer}",
            (choices[index].together / choices[index].num_tokens).tolist(),
            "expert",
            "expert",
        )
        for index in shown
    )
    return (
        HeatMap("experts_utilisation", "Share of routed slots", grid(usage), "mixture", "expert"),
        HeatMap("experts_importance", "Loss without the expert, nats", grid(importance), "mixture", "expert", True),
        *together,
    )
