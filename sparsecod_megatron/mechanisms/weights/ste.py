"""n:m sparsity, straight through: the model computes with the n largest of each m, and all weights learn.

The gradient is that of the masked weights, and every latent weight takes it as its own, so that a weight that is left
out continues to move and may come back.

Source: Bengio et al., Estimating or Propagating Gradients Through Stochastic Neurons (arXiv 1308.3432); as the baseline
of Zhou et al., Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch (arXiv 2102.04010).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine.patterns import indivisible_groups, parsed_pattern, smallest_of_each
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.mechanisms.weights.engine.window import FlipShare, MaskedWindow, masked
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts

MASK_BYTES = 1


@dataclass
class Ste(WeightMechanism):
    """Settings of the mechanism, and of those that change its gradient or its pattern."""

    name: ClassVar[str] = "ste"
    holds_zeros: ClassVar[bool] = False

    pattern: str = "2:4"
    """n:m: of every m neighbours along a matrix's input the model computes with the n largest."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And groups that matrices or their shards cannot hold."""
        yield from super().problems(config)
        rows = [matrix.row for matrix in self.matrices(ParameterTable.of(config))]
        yield from indivisible_groups(self.key("pattern"), self.pattern, rows, config)

    def n_and_m(self, context: StepContext) -> tuple[int, int]:
        """The pattern of a step; n = m is dense."""
        found = parsed_pattern(self.pattern)
        assert found is not None, self.pattern
        return found

    def dead_factor(self, context: StepContext) -> float:
        """What the model multiplies a masked weight by at a step."""
        return 0.0

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """By the step's pattern, also where masked weights only fade."""
        n, m = self.n_and_m(context)
        return [matrix.size * n / m for matrix in self.matrices(table)]

    def zero_pattern(self, layer: int, context: StepContext) -> tuple[int, int] | None:
        """The step's, unless the model still computes with all."""
        n, m = self.n_and_m(context)
        return None if layer in self.skip_layers or n == m or self.dead_factor(context) else (n, m)

    def optimizer_bytes(self, kind: ParameterKind) -> int:
        """Masks are made for each pass."""
        return 0

    def weight_bytes(self, kind: ParameterKind, value_bytes: int) -> int:
        """Latent weights and mask, while the model computes with others."""
        return value_bytes + MASK_BYTES if self.marks(kind) else 0

    def effective_weight(self, kind: ParameterKind, layer: int, weight: Tensor, context: StepContext) -> Tensor:
        """The masked weight; of what may have no mask the weight itself."""
        n, m = self.n_and_m(context)
        if n == m or not self.has_mask(kind, layer):
            return weight
        return masked(weight, smallest_of_each(weight, n, m), self.dead_factor(context))

    def plugin(self, parts: StepParts) -> MaskedWindow:
        """Puts the masks on."""
        return MaskedWindow(self, parts)

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> FlipShare:
        """How much of the mask changes."""
        assert isinstance(plugin, MaskedWindow)
        return FlipShare(plugin)
