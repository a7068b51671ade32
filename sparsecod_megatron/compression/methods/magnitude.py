"""Magnitude pruning: the weights nearest zero become zero.

A share of each matrix (or of each of its rows), or all but n of every m neighbours along the input axis. Experts in one
3-D parameter are a matrix each.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sparsecod_megatron.compression.changes import eligible, holder
from sparsecod_megatron.compression.experts import is_fused
from sparsecod_megatron.compression.method import Material, Method, Outcome
from sparsecod_megatron.compression.patterns import parse_pattern


@dataclass
class MagnitudeSettings:
    """Which weights are pruned."""

    pattern: str = "0.5"
    """Share of weights to prune, or n:m, which keeps n of every m."""
    per: str | None = field(default=None, metadata={"choices": ("matrix", "row")})
    """What the share refers to; None is matrix."""


class Magnitude(Method):
    """See the module."""

    name = "magnitude"
    Settings = MagnitudeSettings

    def __init__(self, settings: MagnitudeSettings) -> None:
        super().__init__(settings)
        self.pattern = parse_pattern(settings.pattern, settings.per)

    def compress(self, material: Material) -> Outcome:
        """Prune every matrix that `reason` has nothing against."""
        for name, weight in list(eligible(material.model)):
            module = holder(material.model, name)
            if not self.reason(module, weight):
                matrix = _by_rows(module, weight)
                kept = matrix.masked_fill(~self.pattern.keep(matrix.abs().float()), 0)
                material.changes.put(name, _by_rows(module, kept))
        return Outcome()

    def reason(self, module: nn.Module, weight: Tensor) -> str:
        """Routers, convolutions, gates of one output, and rows that n:m does not divide are kept."""
        if not (isinstance(module, (nn.Linear, Conv1D)) or is_fused(module)):
            return "routers, convolutions and other weights outside linear layers"
        matrix = _by_rows(module, weight)
        if matrix.shape[-2] == 1:
            return "a gate of one output"
        return self.pattern.obstacle(matrix.shape[-1])


def _by_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """`[..., out, in]` of what GPT-2's layers store as `[in, out]`, and back."""
    return weight.T if isinstance(module, Conv1D) else weight
