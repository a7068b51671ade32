"""ISS: the weights that would be pruned shrink a little with every update instead, and may come back, until a freeze.

The smallest of each matrix, chosen again every few steps, are multiplied by a factor after the optimizer's step; the
model stays dense. From the freeze on the smallest are zeros.

Source: Wang et al., Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution (arXiv 2303.09650), ISS-P;
its length and its factor are for images, and how often the choice is made is ours (theirs: every step).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.weights.engine import masking
from sparsecod_megatron.mechanisms.weights.engine.marks import ZeroedWeights
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.schedules import is_choice, step_of_share
from sparsecod_megatron.mechanisms.weights.engine.selection import largest, magnitude_keys
from sparsecod_megatron.mechanisms.weights.engine.settings import CountedMechanism
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class Iss(CountedMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "iss"

    factor: float = field(default=0.95, metadata={"above": 0, "maximum": 1})
    """What the smallest weights are multiplied by after each update."""
    interval: int = at_least(1, 10)
    """Steps from one choice to the next."""
    freeze: float = field(default=0.5, metadata={"above": 0, "maximum": 1})
    """Share of the steps after which the smallest are zeros for good."""

    @property
    def zeroed_from(self) -> float:
        """The freeze."""
        return self.freeze

    def plugin(self, parts: StepParts) -> SoftMasks:
        """Shrinks, then prunes."""
        return SoftMasks(self, parts)


class SoftMasks(ZeroedWeights):
    """The smallest shrink, then die.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: Iss

    def __init__(self, settings: Iss, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self._counts = settings.final_counts(self.table)

    def is_due(self, context: StepContext) -> bool:
        """Every `interval` steps, and at the freeze."""
        last = step_of_share(self.settings.freeze, context)
        return is_choice(context.step, first=1, last=last, interval=self.settings.interval)

    def chosen(self, context: StepContext) -> list[Tensor]:
        """The smallest of each matrix. Collective over all processes."""
        pieces = self.places.pieces
        keys = [magnitude_keys(piece.master) for piece in pieces]
        rows, counts = [piece.index for piece in pieces], self.places.counts(self._counts)
        return [~large for large in largest(keys, rows, counts, self.places.positions)]

    def change_weights(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """Shrink what is marked, or zero it."""
        if self.settings.is_zeroing(context):
            super().change_weights(piece, marks, context)
        else:
            masking.scale_(piece.master, marks, self.settings.factor)
