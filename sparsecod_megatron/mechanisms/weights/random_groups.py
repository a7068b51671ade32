"""Neurons or heads that are zero from the first step to the last, drawn by a seed: the candidates of random search.

Random search draws K such masks, judges each by its loss before or after a short training, and trains the best. Whether
the first loss says anything about the last is then a question to a study whose cells are seeds
(`examples/studies/nano/random_search.yaml`). Groups are drawn on the CPU, so a seed means the same mask everywhere.

Source: Guo et al., random search as a baseline for sparse neural network architecture search (arXiv 2403.08265).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.weights.engine.group_marks import GroupMarks, GroupMechanism
from sparsecod_megatron.mechanisms.weights.engine.groups import smallest_groups
from sparsecod_megatron.seams.plugin import StepParts

if TYPE_CHECKING:
    from sparsecod_megatron.model.matrices import Shard


@dataclass
class RandomGroups(GroupMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "random_groups"

    mask_seed: int = at_least(0, 0)
    """The mask is drawn by it; `train.seed` draws weights and data."""

    def plugin(self, parts: StepParts) -> DrawnGroups:
        """Holds the dead groups at zero."""
        return DrawnGroups(self, parts)


class DrawnGroups(GroupMarks):
    """Marks of groups that are drawn.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: RandomGroups

    def __init__(self, settings: RandomGroups, parts: StepParts) -> None:
        super().__init__(settings, parts)
        generator = torch.Generator().manual_seed(settings.mask_seed)
        scores = torch.rand(self.groups.number, generator=generator)
        dead = [settings.dead_of(block.count) for block in self.groups.blocks]
        self._dead = smallest_groups(scores, self.groups.blocks, dead, is_global=settings.scope == "global")
        sizes = [(~self._dead[block.first : block.first + block.count]).float().mean() for block in self.groups.blocks]
        pairs = zip(self.places.matrices, self.groups.of_matrix, strict=True)
        self.live = [matrix.size * float(sizes[number]) for matrix, number in pairs]

    def initial_marks(self, index: int, shard: Shard) -> Tensor | None:
        """This rank's part of the drawn groups."""
        marks = self._dead[self.groups.whole_ids(index)].view(self.places.matrices[index].row.shape)
        return shard.cut(marks).to(shard.parameter.device) if marks.any() else None
