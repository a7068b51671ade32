"""SET: dead weights grow at random.

Source: Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity (arXiv
1707.04780); defaults for small tasks in sequence by Yildirim et al., Continual Learning with Dynamic Sparse Training
(arXiv 2308.14831).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsecod_megatron.mechanisms.weights.drop_grow import DropGrow, MovingMasks
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.selection import random_keys
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class Set(DropGrow):
    """Settings of the mechanism."""

    name: ClassVar[str] = "set"

    def plugin(self, parts: StepParts) -> MovingMasks:
        """Moves the masks."""
        return RandomGrowth(self, parts)


class RandomGrowth(MovingMasks):
    """In an order that belongs to the seed, the step and the weight's place in the model."""

    def growth_keys(self, number: int, piece: Piece, candidates: Tensor, context: StepContext) -> Tensor:
        """The same numbers under every layout. Local."""
        digest = hashlib.sha256(f"{self.seed} growth {context.step}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little") >> 1
        return random_keys(self.places.positions(number), seed, candidates)
