"""Dynamic sparse training: now and then the smallest live weights die, and as many dead ones start at zero.

The number of live weights of each matrix never changes. What a method adds is which dead weights grow.

Source: Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity (SET, arXiv
1707.04780); Evci et al., Rigging the Lottery (RigL, arXiv 1911.11134), whose schedule both have here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sparsecod_megatron.config.fields import at_least, choice
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.schedules import cosine_share
from sparsecod_megatron.mechanisms.weights.engine.selection import largest, magnitude_keys
from sparsecod_megatron.mechanisms.weights.engine.settings import CountedMechanism
from sparsecod_megatron.mechanisms.weights.sparse_weights import RandomMasks
from sparsecod_megatron.seams.plugin import StepContext


@dataclass
class DropGrow(CountedMechanism):
    """Settings of both methods."""

    distribution: str = choice("erk", "uniform")
    """`erk`: density ∝ (rows + columns) / (rows · columns). `uniform`: the same share in each matrix."""
    interval: int = at_least(1, 100)
    """Steps from one change of the masks to the next."""
    drop_fraction: float = field(default=0.3, metadata={"above": 0, "maximum": 1})
    """Share of the live weights that the first change replaces; falls to 0 as a cosine."""
    stop: float = field(default=0.75, metadata={"above": 0, "maximum": 1})
    """Share of the steps from which on masks stay."""


class MovingMasks(RandomMasks):
    """Drops by magnitude and grows by what a method says, in this order.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: DropGrow

    def growth_keys(self, number: int, piece: Piece, candidates: Tensor, context: StepContext) -> Tensor:
        """Keys of a piece by which weights grow, the largest first; `NO_CANDIDATE` outside of `candidates`. Local."""
        raise NotImplementedError

    def is_due(self, context: StepContext) -> bool:
        """Every `interval` steps, until `stop`."""
        return context.step % self.settings.interval == 0 and context.progress < self.settings.stop

    def chosen(self, context: StepContext) -> list[Tensor]:
        """What is neither kept nor grown. Collective over all processes."""
        pieces, settings = self.places.pieces, self.settings
        share = cosine_share(context.step, stop=settings.stop * context.last_step, first=settings.drop_fraction)
        replaced = [int(share * count) for count in self.counts]
        rows = [piece.index for piece in pieces]
        keys = [magnitude_keys(piece.master, ~piece.marked) for piece in pieces]
        kept_counts = [count - moved for count, moved in zip(self.counts, replaced, strict=True)]
        kept = largest(keys, rows, self.places.counts(kept_counts), self.places.positions)
        # What has just been dropped may grow again, and then keeps its value and moments.
        keys = [
            self.growth_keys(number, piece, ~alive, context)
            for number, (piece, alive) in enumerate(zip(pieces, kept, strict=True))
        ]
        grown = largest(keys, rows, self.places.counts(replaced), self.places.positions)
        return [~(alive | new) for alive, new in zip(kept, grown, strict=True)]
