"""SR-STE: straight-through n:m sparsity whose masked weights are pulled towards zero, so that masks settle.

The gradient of a weight is ∂L/∂W̃ + λ (1 − m) W, added once a step to what data-parallel ranks have reduced: λ depends
neither on their number nor on that of micro-batches, as it does in the reference code, which sums it over GPUs. Under
Adam, which divides by the gradient's size, λ is not SGD's.

Source: Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (arXiv 2102.04010), eq. 9,
λ = 2e-4 under SGD; for Adam Hu et al., Accelerating Transformer Pre-training with 2:4 Sparsity (arXiv 2404.01847).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.weights.engine import masking
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.window import MaskedWindow
from sparsecod_megatron.mechanisms.weights.ste import Ste
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class SrSte(Ste):
    """Settings of the mechanism."""

    name: ClassVar[str] = "srste"

    decay: float = at_least(0, 2e-4)
    """λ: what of a masked weight is added to its gradient."""

    def plugin(self, parts: StepParts) -> MaskedWindow:
        """Puts the masks on, and adds the pull."""
        return PulledWindow(self, parts)


class PulledWindow(MaskedWindow):
    """With λ.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    def __init__(self, settings: SrSte, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self._decay = settings.decay

    def change_gradient(self, piece: Piece, dead: Tensor, context: StepContext) -> None:
        """g + λ (1 − m) W."""
        masking.add_(piece.gradient, dead, piece.master, self._decay)
