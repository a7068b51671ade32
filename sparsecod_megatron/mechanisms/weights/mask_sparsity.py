"""MaskSparsity: group lasso on the groups that are to be pruned, and on no others.

The smallest groups are marked at a share of the steps; from then on each update shrinks them by η s / ‖w_G‖, so that
their norms fall in a straight line to exactly zero, while the others train as without it; at the freeze they are zero.
The norm is that before the update, which every process knows when the update comes.

The paper marks channels by BatchNorm's scales, for images; without them the groups' own weights are marked here.

Source: Jiang et al., MaskSparsity, Pruning-aware Sparse Regularization for Network Pruning (arXiv 2201.06776).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.weights.engine.group_marks import GroupMarks, GroupMechanism
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.schedules import step_of_share
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class MaskSparsity(GroupMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "mask_sparsity"

    strength: float = at_least(0, 5e-4)
    """s: what the norm of a marked group loses with an update, in learning rates."""
    start: float = field(default=0.25, metadata={"minimum": 0, "below": 1})
    """Share of the steps after which the groups are marked."""
    freeze: float = field(default=0.75, metadata={"above": 0, "maximum": 1})
    """Share of the steps after which marked groups are zeros."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And phases in a wrong order."""
        yield from super().problems(config)
        if self.start >= self.freeze:
            yield f"{self.key('start')}: {self.start} is not below {self.key('freeze')}={self.freeze}; lower it"

    @property
    def zeroed_from(self) -> float:
        """The freeze."""
        return self.freeze

    def plugin(self, parts: StepParts) -> LassoedGroups:
        """Shrinks, then prunes."""
        return LassoedGroups(self, parts)


class LassoedGroups(GroupMarks):
    """Group lasso on marked groups.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: MaskSparsity

    def __init__(self, settings: MaskSparsity, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self._norms: Tensor | None = None

    def is_due(self, context: StepContext) -> bool:
        """Twice: when groups are marked, and when they become zeros."""
        return context.step in (step_of_share(share, context) for share in (self.settings.start, self.settings.freeze))

    def chosen(self, context: StepContext) -> list[Tensor]:
        """The smallest groups; at the freeze those that are marked. Collective over all processes."""
        if self.settings.is_zeroing(context) and step_of_share(self.settings.start, context) < context.step:
            return [piece.marked.clone() for piece in self.places.pieces]
        return self.smallest(self.root_mean_squares(), context)

    def on_gradients(self, context: StepContext) -> None:
        """And take the norms, which the update's shrinking needs. Collective over all processes."""
        super().on_gradients(context)
        marks = step_of_share(self.settings.start, context)
        self._norms = self.groups.norms() if marks <= context.step and not self.settings.is_zeroing(context) else None

    def change_weights(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """w_G · max(0, 1 − η s / ‖w_G‖), or zeros."""
        if self._norms is None:
            super().change_weights(piece, marks, context)
            return
        kept = (1 - piece.learning_rate * self.settings.strength / self._norms.clamp(min=1e-30)).clamp(min=0)
        for part in self.groups.rectangles[piece]:
            part.of(piece.master).mul_(part.spread(kept).where(part.line(marks), 1.0))
