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
from sparsecod_megatron.hf.calls import Trace

TOKENS_PER_SEQUENCE = 8
MAX_EXACT_WIDTH = 512
"""Widest residual stream whose whole Jacobians are taken: their cost grows with d³."""
NUM_PROBES = 32
NUMBERS = tuple(field.name for field in fields(TokenJacobians))
NUMBERS_SHOWN = tuple(name for name in NUMBERS if name != "deviation_variance")


class Jacobian:
    """Four numbers of `∂h_{l+1}[t]/∂h_l[t]` with the other tokens fixed, at tokens drawn from each sequence.

    Args:
        exact: take whole Jacobians; None does so up to `MAX_EXACT_WIDTH` channels.
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
        exact = context.hidden_size <= MAX_EXACT_WIDTH if self.exact is None else self.exact
        num_tokens = context.num_sequences * context.seq_length
        size = context.hidden_size if context.reference else 0
        totals = torch.zeros(len(context.layers), size, size, dtype=torch.float64)
        (numbers,) = context.collect("all", self._batches(context, totals, exact=exact))
        if not context.reference:
            return self._result(context, numbers.numpy(), [], exact=exact)
        totals = context.processes.total(totals)
        reference = [reference_deviation(total, num_tokens) for total in totals]
        return self._result(context, numbers.numpy(), reference, exact=exact)

    def _batches(self, context: Context, totals: Tensor, *, exact: bool) -> Iterator[tuple[Tensor]]:
        """`NUMBERS` of each micro-batch [B, L, numbers], means over a sequence's tokens; NaN where not estimated.

        Args:
            context: the model and the sample.
            totals: [L, d, d], to which the reference's sums are added if they are wanted.
            exact: whether to take whole Jacobians.
        """
        places = self.draw_positions(context.num_sequences, context.seq_length, context.generator())
        first = context.processes.places(context.num_sequences).start
        for trace in context.traces("all", title=self.name):
            sequences = range(first, first + len(trace.tokens))
            positions, first = places[sequences].to(context.device), sequences.stop
            layers = []
            for layer in range(len(context.layers)):
                parts = self._blocks(context, trace, layer, positions, signs_of=None if exact else sequences)
                layers.append(torch.cat([_means(part) for part in parts]))
                if context.reference:
                    totals[layer] += summed_jacobian(context.replay, trace, layer).cpu()
            yield (torch.stack(layers, dim=1),)

    def draw_positions(self, num_sequences: int, length: int, generator: torch.Generator) -> Tensor:
        """[num_sequences, p] different places in each sequence of `length` tokens."""
        return torch.rand(num_sequences, length, generator=generator).argsort(dim=1)[:, : self.tokens_per_sequence]

    def _blocks(
        self,
        context: Context,
        trace: Trace,
        layer: int,
        positions: Tensor,
        *,
        signs_of: range | None,
    ) -> Iterator[TokenJacobians]:
        """Numbers of one block for as many sequences at a time as fit the memory.

        Args:
            context: the model and the sample.
            trace: the micro-batch.
            layer: the block.
            positions: [B, p] places in each sequence.
            signs_of: the sequences' numbers in the sample, to estimate; None takes whole Jacobians.
        """
        floats_per_channel = 4 * context.hidden_size if signs_of is None else 64
        bytes_per_sequence = 4 * positions.shape[1] * context.hidden_size * floats_per_channel
        at_once = max(1, int(context.memory_gib * 2**30 // bytes_per_sequence))
        with isolated(context.replay, trace, layer) as apart:
            all_rows = torch.arange(len(positions), device=positions.device)
            apart.check(all_rows, positions)
            for rows in all_rows.split(at_once):
                if signs_of is None:
                    yield exact_numbers(apart, rows, positions[rows])
                else:
                    signs = [self._signs(context, layer, signs_of[row], positions.shape[1]) for row in rows.tolist()]
                    yield estimated_numbers(apart, rows, positions[rows], torch.stack(signs, dim=1))

    def _signs(self, context: Context, layer: int, sequence: int, num_places: int) -> Tensor:
        """[probes, p, d] of ±1 in int8, the same for a sequence whichever micro-batch or process it is in."""
        seed = np.random.SeedSequence([context.seed, layer, sequence]).generate_state(1)
        shape = (self.num_probes, num_places, context.hidden_size)
        drawn = torch.randint(2, shape, generator=torch.Generator().manual_seed(int(seed[0])), dtype=torch.int8)
        return drawn * 2 - 1

    def _result(self, context: Context, numbers: Array, reference: list[float], *, exact: bool) -> Result:
        """From `NUMBERS` [N, L, numbers] and the reference's number of each layer, if wanted."""
        names = NUMBERS_SHOWN if exact else ("deviation", "diagonal_mean")
        columns = {name: numbers[:, :, NUMBERS.index(name)] for name in names}
        num_tokens = context.num_sequences * min(self.tokens_per_sequence, context.seq_length)
        variances = numbers[:, :, NUMBERS.index("deviation_variance")].mean(axis=0) / num_tokens
        estimates = {name: mean_interval(column, seed=context.seed) for name, column in columns.items()}
        rows = []
        for layer in range(len(context.layers)):
            row: dict[str, Any] = {"layer": layer}
            for name in names:
                value, low, high = estimates[name].at(layer)
                row |= {name: value, f"{name}_low": low, f"{name}_high": high}
            if not exact:
                row["deviation_stderr"] = float(variances[layer]) ** 0.5
            if reference:
                row["ref_jacobian"] = reference[layer]
            rows.append(row)
        overall = mean_interval(columns["deviation"].mean(axis=1), seed=context.seed).at()
        values: dict[str, Any] = {"jacobian_deviation": overall.as_dict(), "exact": exact}
        values |= {f"jacobian_{name}": float(columns[name].mean()) for name in names[1:]}
        if reference:
            values["ref_jacobian"] = float(np.mean(reference))
        intervals = [estimates["deviation"].at(layer) for layer in range(len(rows))]
        return Result(
            values=values,
            tables={self.name: rows},
            per_sequence={"jacobian_deviation": columns["deviation"].mean(axis=1).tolist()},
            figures=(_bars(intervals),),
            num_sequences=context.num_sequences,
            num_tokens=num_tokens,
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


def _means(part: TokenJacobians) -> Tensor:
    """[b, numbers] means over tokens in float64 on the CPU, NaN for what was not estimated."""
    columns = [getattr(part, name) for name in NUMBERS]
    absent = torch.full_like(part.deviation, torch.nan)
    return torch.stack([absent if column is None else column for column in columns], dim=-1).mean(dim=1).cpu()
