"""RigL: dead weights grow where the gradient of the whole batch is largest.

Megatron-Core computes the dense gradient of every weight anyway, so that of a dead one costs nothing but its reading,
after it has been reduced over data-parallel ranks and before it is masked.

Source: Evci et al., Rigging the Lottery (arXiv 1911.11134), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsecod_megatron.mechanisms.weights.drop_grow import DropGrow, MovingMasks
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.selection import magnitude_keys
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class RigL(DropGrow):
    """Settings of the mechanism."""

    name: ClassVar[str] = "rigl"

    def plugin(self, parts: StepParts) -> MovingMasks:
        """Moves the masks."""
        return GradientGrowth(self, parts)


class GradientGrowth(MovingMasks):
    """By the magnitude of the gradient."""

    def growth_keys(self, number: int, piece: Piece, candidates: Tensor, context: StepContext) -> Tensor:
        """|∂L/∂W| of dead weights too. Local."""
        return magnitude_keys(piece.gradient, candidates)
