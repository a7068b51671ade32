"""Jacobian: how far is a block, as a function of one token, from passing that token through unchanged?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, Interval, mean_interval
from sparsecod_megatron.analysis.isolation import isolated
from sparsecod_megatron.analysis.jacobians import (
    TokenJacobians,
    estimated_numbers,
    exact_numbers,
    reference_deviation,
    summed_jacobian,
)
from sparsecod_megatron.analysis.scores.base import Bars, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.trace import Trace

TOKENS_PER_SEQUENCE = 8
LARGEST_EXACT = 512
"""Widest residual stream whose whole Jacobians are taken: their cost grows with d³."""
NUM_PROBES = 32
NUMBERS = tuple(field.name for field in fields(TokenJacobians) if field.name != "deviation_variance")


class Jacobian:
    """Four numbers of `∂h_{l+1}[t]/∂h_l[t]` with the other tokens fixed, at tokens drawn from each sequence.

    Args:
        exact: take whole Jacobians; None does so up to `LARGEST_EXACT` channels.
        tokens_per_sequence: places drawn in each sequence.
        num_probes: random vectors a token where they are estimated.
    """

    name = "jacobian"

    def __init__(
        self,
        *,
        exact: bool | None = None,
        tokens_per_sequence: int = TOKENS_PER_SEQUENCE,
        num_probes: int = NUM_PROBES,
    ) -> None:
        self.exact = exact
        self.tokens_per_sequence = tokens_per_sequence
        self.num_probes = num_probes

    def run(self, context: Context) -> Result:
        """Compute the numbers of every block, as means over tokens."""
        exact = context.hidden_size <= LARGEST_EXACT if self.exact is None else self.exact
        generator = context.generator()
        num_tokens = context.num_sequences * context.seq_length
        totals = torch.zeros(len(context.layers), context.hidden_size, context.hidden_size, dtype=torch.float64)
        batches: list[list[TokenJacobians]] = []
        for trace in context.traces("all", title=self.name):
            positions = self.draw_positions(len(trace.tokens), context.seq_length, generator).to(context.device)
            batches.append([])
            for layer in range(len(context.layers)):
                parts = self._blocks(context, trace, layer, positions, exact=exact, generator=generator)
                batches[-1].append(_joined(list(parts)))
                if context.reference:
                    totals[layer] += summed_jacobian(context.replay, trace, layer).cpu()
        layers = [_joined(list(batch)) for batch in zip(*batches, strict=True)]
        return self._result(
            context, layers, [reference_deviation(total, num_tokens) for total in totals] if context.reference else []
        )

    def draw_positions(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """[batch, p] different places in each sequence of `length` tokens."""
        return torch.rand(batch, length, generator=generator).argsort(dim=1)[:, : self.tokens_per_sequence]

    def _blocks(
        self,
        context: Context,
        trace: Trace,
        layer: int,
        positions: Tensor,
        *,
        exact: bool,
        generator: torch.Generator,
    ) -> Iterator[TokenJacobians]:
        """Numbers of one block for as many sequences at a time as whole Jacobians fit the memory."""
        bytes_per_sequence = 4 * positions.shape[1] * context.hidden_size * (4 * context.hidden_size if exact else 64)
        at_once = max(1, int(context.memory_gib * 2**30 // bytes_per_sequence))
        with isolated(context.model, trace, context.layers.blocks[layer], layer) as apart:
            everything = torch.arange(len(positions), device=positions.device)
            apart.check(everything, positions)
            for rows in everything.split(at_once):
                if exact:
                    yield exact_numbers(apart, rows, positions[rows])
                else:
                    yield estimated_numbers(
                        apart, rows, positions[rows], num_probes=self.num_probes, generator=generator
                    )

    def _result(self, context: Context, layers: list[TokenJacobians], reference: list[float]) -> Result:
        exact = layers[0].spectral is not None
        names = NUMBERS if exact else ("deviation", "diagonal_mean")
        # [N, L] of each number: the mean over a sequence's tokens.
        columns = {name: _column(layers, name) for name in names}
        estimates = {name: mean_interval(column, seed=context.seed) for name, column in columns.items()}
        rows = []
        for layer, numbers in enumerate(layers):
            row: dict[str, Any] = {"layer": layer}
            for name in names:
                value, low, high = estimates[name].at(layer)
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            if not exact:
                row["deviation_stderr"] = float(numbers.deviation_variance.mean() / numbers.deviation.numel()) ** 0.5
            if reference:
                row["ref_jacobian"] = reference[layer]
            rows.append(row)
        overall = mean_interval(columns["deviation"].mean(axis=1), seed=context.seed).at()
        values: dict[str, Any] = {"jacobian_deviation": overall.as_dict(), "exact": exact}
        values |= {f"jacobian_{name}": float(columns[name].mean()) for name in names[1:]}
        if reference:
            values["ref_jacobian"] = float(np.mean(reference))
        intervals = [estimates["deviation"].at(layer) for layer in range(len(layers))]
        return Result(
            values=values,
            tables={self.name: rows},
            per_sequence={"jacobian_deviation": columns["deviation"].mean(axis=1).tolist()},
            figures=(_bars(intervals),),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * min(self.tokens_per_sequence, context.seq_length),
        )


def _bars(intervals: list[Interval]) -> Bars:
    return Bars(
        "jacobian",
        "Distance of a block's Jacobian from the identity",
        [interval.value for interval in intervals],
        "‖J − I‖ / √d",
        low=[interval.low for interval in intervals],
        high=[interval.high for interval in intervals],
    )


def _column(layers: list[TokenJacobians], name: str) -> Array:
    column: Array = torch.stack([getattr(numbers, name).mean(dim=1) for numbers in layers], dim=1).numpy()
    return column


def _joined(parts: list[TokenJacobians]) -> TokenJacobians:
    """One object for all sequences, on the CPU."""

    def join(name: str) -> Tensor | None:
        columns = [getattr(part, name) for part in parts]
        return None if columns[0] is None else torch.cat([column.cpu() for column in columns])

    return TokenJacobians(**{field.name: join(field.name) for field in fields(TokenJacobians)})  # type: ignore[arg-type]
