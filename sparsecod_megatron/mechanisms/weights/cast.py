"""CAST's decay: a dense model whose weights outside an n:m mask are drawn to zero by L1, inside Adam's own scaling.

Every few steps the mask is chosen again by magnitude; after each update what it leaves out moves towards zero by
η λ_t / (√v̂ + ε), and stops there instead of changing its sign. λ_t rises linearly. At the end what is left out is zero.

The paper's AdamS lets λ rise over the whole run (`rise: 1`) while the loss's own momentum of these weights fades by
1 − t / T, and takes the second moment of the sum with the decay; here the loss moves them to the end, and the second
moment is that of the loss alone. Its scales of rows are `row_scaling` beside this, its distillation from the dense
model is `distillation`.

Source: Huang et al., CAST: Continuous and Differentiable Semi-Structured Sparsity-Aware Training for Large Language
Models (arXiv 2509.25996).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine.marks import ZeroedWeights
from sparsecod_megatron.mechanisms.weights.engine.masking import numbered
from sparsecod_megatron.mechanisms.weights.engine.patterns import indivisible_groups, parsed_pattern, smallest_of_each
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.schedules import is_choice, step_of_share
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class Cast(WeightMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "cast"

    pattern: str = "2:4"
    """n:m along a matrix's input."""
    interval: int = at_least(1, 10)
    """Steps from one mask to the next."""
    decay: float = at_least(0, 6e-5)
    """λ at its largest."""
    rise: float = field(default=0.5, metadata={"above": 0, "maximum": 1})
    """Share of the steps over which λ rises from 0."""
    harden: float = field(default=1.0, metadata={"above": 0, "maximum": 1})
    """Share of the steps after which what the mask leaves out is zero."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And groups that matrices or their shards cannot hold."""
        yield from super().problems(config)
        rows = [matrix.row for matrix in self.matrices(ParameterTable.of(config))]
        yield from indivisible_groups(self.key("pattern"), self.pattern, rows, config)

    def n_and_m(self) -> tuple[int, int]:
        """The pattern."""
        found = parsed_pattern(self.pattern)
        assert found is not None, self.pattern
        return found

    @property
    def zeroed_from(self) -> float:
        """When masks harden."""
        return self.harden

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """All until masks harden."""
        n, m = self.n_and_m() if self.is_zeroing(context) else (1, 1)
        return [matrix.size * n / m for matrix in self.matrices(table)]

    def zero_pattern(self, layer: int, context: StepContext) -> tuple[int, int] | None:
        """Once masks have hardened."""
        return self.n_and_m() if layer not in self.skip_layers and self.is_zeroing(context) else None

    def plugin(self, parts: StepParts) -> DrawnToZero:
        """Decays, then prunes."""
        return DrawnToZero(self, parts)


class DrawnToZero(ZeroedWeights):
    """L1 on what n:m masks leave out.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: Cast

    def is_due(self, context: StepContext) -> bool:
        """Every `interval` steps, and when masks harden."""
        last = step_of_share(self.settings.harden, context)
        return is_choice(context.step, first=1, last=last, interval=self.settings.interval)

    def chosen(self, context: StepContext) -> list[Tensor]:
        """By the weights that forward passes have gathered, whose groups slices may cut. Local."""
        n, m = self.settings.n_and_m()
        dead = {shard.parameter: smallest_of_each(shard.parameter, n, m) for _, shard in self.places.shards}
        return [piece.slice_of(dead[piece.shard.parameter]).clone() for piece in self.places.pieces]

    def change_weights(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """The proximal step of λ_t |W| in the metric of Adam, or zeros."""
        if self.settings.is_zeroing(context):
            super().change_weights(piece, marks, context)
            return
        group = piece.group
        decay = self.settings.decay * min(context.progress / self.settings.rise, 1.0)
        # η λ / (√(v / c) + ε) is η λ √c / (√v + ε √c), whose factors are numbers.
        correction = math.sqrt(1 - group["betas"][1] ** group["step"])
        for numbers, weights, squares in numbered(marks, piece.master, piece.moments[1]):
            deviation = squares.sqrt().add_(group["eps"] * correction)
            threshold = numbers.to(weights.dtype).mul_(group["lr"] * decay * correction).div_(deviation)
            weights.sub_(torch.clamp(weights, -threshold, threshold))
