"""Weights that are zero from the first step to the last: a random mask of exact counts, drawn by each matrix's name.

A dead weight is a zero in the parameter, so the forward pass is the dense one. Its gradient is masked before the norm,
so that its moments stay zero too, and neither AdamW nor weight decay ever moves it. The products stay dense: nothing is
saved in training. A checkpoint's mask is kept, whatever `train.seed` says.

Source: Liu et al., The Unreasonable Effectiveness of Random Pruning (arXiv 2202.02643); with `density: 0.25` and
`uniform` the sparse part of Thangarasa et al., SPDF (arXiv 2303.10464).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.mechanisms.weights.engine.marks import ZeroedWeights
from sparsecod_megatron.mechanisms.weights.engine.settings import CountedMechanism
from sparsecod_megatron.seams.plugin import StepParts

if TYPE_CHECKING:
    from sparsecod_megatron.model.matrices import Shard


@dataclass
class SparseWeights(CountedMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "sparse_weights"

    def plugin(self, parts: StepParts) -> RandomMasks:
        """Holds the dead weights at zero."""
        return RandomMasks(self, parts)


class RandomMasks(ZeroedWeights):
    """Masks that are drawn, of exact counts; a subclass may move them.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    def __init__(self, settings: CountedMechanism, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self.counts = settings.final_counts(self.table)
        self.live = [float(count) for count in self.counts]

    def initial_marks(self, index: int, shard: Shard) -> Tensor | None:
        """Drawn on the CPU, whose order is the same everywhere; every rank draws the whole and keeps its part."""
        from sparsecod_megatron.model.matrices import named_generator

        matrix = self.places.matrices[index]
        if self.counts[index] == matrix.size:
            return None
        generator = named_generator(f"{self.seed} mask {shard.matrix.name}", torch.device("cpu"))
        order = torch.randperm(matrix.size, generator=generator)
        dead = torch.ones(matrix.size, dtype=torch.bool)
        dead[order[: self.counts[index]]] = False
        return shard.cut(dead.view(matrix.row.shape)).to(shard.parameter.device)
