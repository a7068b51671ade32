"""SPDF: sparse pretraining, dense fine-tuning; a random mask that is taken away at a share of the steps.

The revived weights start at zero with moments of zero, while Adam's bias correction is that of a late step: for a
constant gradient the k-th update after the switch is (1 − β1^k) / √(1 − β2^k) of the learning rate, at most 1.10 with
β = (0.9, 0.95), but 6.6 with β2 = 0.999.

Source: Thangarasa et al., SPDF: Sparse Pre-training and Dense Fine-tuning (arXiv 2303.10464).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.mechanisms.weights.engine.schedules import step_of_share
from sparsecod_megatron.mechanisms.weights.engine.settings import CountedMechanism
from sparsecod_megatron.mechanisms.weights.sparse_weights import RandomMasks
from sparsecod_megatron.seams.plugin import StepContext, StepParts

LARGEST_BETA2 = 0.99
"""Above it updates after the switch exceed the learning rate by more than 2.2."""


@dataclass
class Spdf(CountedMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "spdf"

    density: float = field(default=0.25, metadata={"above": 0, "maximum": 1})
    """Share of weights that live in the sparse steps, of all matrices with masks."""
    dense_after: float = field(default=0.8, metadata={"above": 0, "below": 1})
    """Share of the steps after which all weights are trained."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And moments that forget too slowly for weights that begin late."""
        yield from super().problems(config)
        if (beta := config.optimizer.adam_beta2) > LARGEST_BETA2:
            yield (
                f"optimizer.adam_beta2: {beta} with {self.key('dense_after')}: revived weights would move by several "
                f"times the learning rate; lower it to {LARGEST_BETA2} or below"
            )

    def share(self, context: StepContext) -> float:
        """All of it in the sparse steps, whose last one takes the masks away."""
        return float(context.step < step_of_share(self.dense_after, context))

    def plugin(self, parts: StepParts) -> RandomMasks:
        """Holds the dead weights at zero, for a time."""
        return LiftedMasks(self, parts)


class LiftedMasks(RandomMasks):
    """Random masks until a step.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: Spdf

    def is_due(self, context: StepContext) -> bool:
        """Once: the last sparse step takes the masks away."""
        return context.step == step_of_share(self.settings.dense_after, context)

    def chosen(self, context: StepContext) -> list[Tensor]:
        """None."""
        return [torch.zeros_like(piece.marked) for piece in self.places.pieces]
