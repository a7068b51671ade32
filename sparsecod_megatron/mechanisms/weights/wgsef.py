"""WGSEF: the convex envelope of "at most k groups are not zero", as a proximal step after each update.

The envelope of ½ ‖w‖² over vectors with at most k live groups is half the squared k-support norm of their norms z. Its
proximal step with weight λ shrinks group j to θ_j / (θ_j + λ) of itself, θ_j = clip(z_j / μ − λ, 0, 1), μ such that
Σ θ_j = k: large groups lose little, small ones all. λ is times the learning rate; norms are those before the update,
which every process knows when it comes. One step does not leave only k groups, so that the freeze makes the rest zero.

Source: Zhang et al., arXiv 2212.12921, the regulariser; the proximal step follows from ½ ‖x‖²_k = min_θ ½ Σ x² / θ
(Argyriou et al., Sparse Prediction with the k-Support Norm, arXiv 1204.5043) and is derived here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparsecod_megatron.config.fields import above
from sparsecod_megatron.mechanisms.weights.engine.group_marks import GroupMarks, GroupMechanism
from sparsecod_megatron.mechanisms.weights.engine.places import Piece
from sparsecod_megatron.mechanisms.weights.engine.schedules import step_of_share
from sparsecod_megatron.seams.plugin import StepContext, StepParts

BISECTIONS = 60
"""Halvings of an interval of fp64: more would change nothing."""


@dataclass
class Wgsef(GroupMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "wgsef"

    strength: float = above(0, 1.0)
    """λ, in learning rates."""
    freeze: float = field(default=0.75, metadata={"above": 0, "maximum": 1})
    """Share of the steps after which all but the k largest groups are zeros."""

    @property
    def zeroed_from(self) -> float:
        """The freeze."""
        return self.freeze

    def plugin(self, parts: StepParts) -> EnvelopedGroups:
        """Shrinks, then prunes."""
        return EnvelopedGroups(self, parts)


class EnvelopedGroups(GroupMarks):
    """The proximal step of the envelope.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: Wgsef

    def __init__(self, settings: Wgsef, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self._sizes: Tensor | None = None
        self._kept: dict[float, Tensor] = {}

    def is_due(self, context: StepContext) -> bool:
        """At the freeze."""
        return context.step == step_of_share(self.settings.freeze, context)

    def chosen(self, context: StepContext) -> list[Tensor]:
        """The smallest groups. Collective over all processes."""
        return self.smallest(self.root_mean_squares(), context)

    def on_gradients(self, context: StepContext) -> None:
        """And take the groups' sizes, which the update's shrinking needs. Collective over all processes."""
        super().on_gradients(context)
        self._kept = {}
        self._sizes = None if self.settings.is_zeroing(context) else self.root_mean_squares()

    def change_weights(self, piece: Piece, marks: Tensor, context: StepContext) -> None:
        """w_G · θ / (θ + λ), or zeros."""
        if self._sizes is None:
            super().change_weights(piece, marks, context)
            return
        weight = piece.learning_rate * self.settings.strength
        if weight not in self._kept:
            self._kept[weight] = self._kept_of_all(self._sizes, weight)
        for part in self.groups.rectangles[piece]:
            part.of(piece.master).mul_(part.spread(self._kept[weight]))

    def _kept_of_all(self, sizes: Tensor, weight: float) -> Tensor:
        counts = [block.count for block in self.groups.blocks]
        live = [count - self.settings.dead_of(count) for count in counts]
        if self.settings.scope == "global":
            counts, live = [sum(counts)], [sum(live)]
        return kept_shares(sizes, counts, live, weight)


def kept_shares(sizes: Tensor, counts: Sequence[int], live: Sequence[int], weight: float) -> Tensor:
    """θ / (θ + λ) of each group, between 0 and 1 / (1 + λ). Local, without waiting for the device.

    Args:
        sizes: z, [groups], block after block.
        counts: groups of each block.
        live: k of each block, the groups that are to live.
        weight: λ.
    """
    # All blocks at once: one after another they would be thousands of small kernels. Groups of size 0, whose θ is 0,
    # fill the rows up.
    z = pad_sequence(list(sizes.double().split(list(counts))), batch_first=True)
    k = torch.tensor(live, dtype=z.dtype).to(z.device, non_blocking=True).unsqueeze(1)
    # Σ θ falls as μ grows: it is the number of groups at the low end, and at most k at the high one.
    low, high = torch.zeros_like(k), z.sum(dim=1, keepdim=True) / (k * weight) + 1e-30
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_many = (z / middle - weight).clamp(0, 1).sum(dim=1, keepdim=True) > k
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    theta = (z / high - weight).clamp(0, 1)
    kept = theta / (theta + weight)
    return torch.cat([row[:count] for row, count in zip(kept, counts, strict=True)]).to(sizes.dtype)
