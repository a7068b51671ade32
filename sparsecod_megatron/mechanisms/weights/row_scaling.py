"""Weights times a learned scale for each part of a row, which CAST sets against what its decay takes from weights.

Element (r, c) of a matrix [R, C] is multiplied by A[r, ⌊c n / C⌋], A [R, n] starting at 1: the columns make n groups of
neighbours. A trains and is saved as any parameter, with the decay of norms' gains; masks go by the weights without it,
and an export holds the product, whose zeros are theirs. With A = 1 a pass is bit for bit the one without.

Source: Huang et al., CAST (arXiv 2509.25996), equations 11 and 12, n = 2, and algorithm 2, which folds A into the
weights after they are pruned. The paper's text was not at hand: this is as the notes of a public reproduction cite it
(github liuhanzuo/Mixture-of-Memory, baselines/cast_repro/SPEC.md), whose reading it also is that groups are contiguous
columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.mechanisms.weights.factors.factors import Factor
from sparsecod_megatron.mechanisms.weights.factors.mechanism import Factored
from sparsecod_megatron.seams.mechanism import Mechanism

SCALE = "row_scale"
"""Name of the parameter A in a linear layer."""


@dataclass
class RowScaling(Factored):
    """Settings of the mechanism."""

    name: ClassVar[str] = "row_scaling"
    shapes_weights: ClassVar[bool] = False
    adds_modules: ClassVar[tuple[str, ...]] = (SCALE,)
    keeps_matrix: ClassVar[bool] = True

    groups: int = at_least(1, 2)
    """n: scales of a row."""

    def reason_against(self, other: Mechanism) -> str | None:
        """Zeros stay zeros. A mask that is made for each pass would be made of other weights in an export."""
        if isinstance(other, WeightMechanism):
            return None if other.holds_zeros else ", whose masks are made for each pass, of weights without scales"
        return ""

    def factors(self, kind: ParameterKind) -> tuple[Factor, ...]:
        """A; its rows are cut with the matrix's, and columns that ranks share lie in groups of all."""
        return (Factor(SCALE, (kind.shape[0], self.groups), 0 if kind.dimension == 0 else None),)

    def made_of(self, kind: ParameterKind, model: ModelConfig, layer: int) -> tuple[ParameterKind, ...]:
        """The matrix, and its scales beside it."""
        matrix, *scales = super().made_of(kind, model, layer)
        return (matrix, *(dataclasses.replace(scale, group="norms") for scale in scales))

    def part_of_rank(self, kind: ParameterKind, factor: Tensor, rank: int, ranks: int) -> Tensor:
        """The scales of its columns: of as many smaller groups as make every rank's columns whole groups."""
        if kind.dimension != 1:
            return factor
        return factor.repeat_interleave(math.lcm(self.groups, ranks) // self.groups, dim=1).chunk(ranks, dim=1)[rank]

    def composed(self, kind: ParameterKind, parts: Mapping[str, Tensor]) -> Tensor:
        """W times the scale of its row and group."""
        weight, scale = parts["weight"], parts[SCALE]
        return (weight.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(-1)).flatten(1)

    def drawn(self, kind: ParameterKind, factor: Factor, std: float, generator: torch.Generator) -> Tensor:
        """Ones."""
        return torch.ones(factor.shape, device=generator.device)

    def size_problems(self, kind: ParameterKind, ranks: int) -> Iterator[str]:
        """Groups of different sizes."""
        if kind.shape[1] % self.groups:
            yield f"{self.key('groups')}: {self.groups} does not divide the columns of {kind.name} {list(kind.shape)}"

    def made_small(self, model: ModelConfig, small: ModelConfig) -> RowScaling:
        """Two groups at most, which every small size has."""
        return dataclasses.replace(self, groups=min(self.groups, 2))
