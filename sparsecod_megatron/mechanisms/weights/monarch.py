"""Monarch matrices: two block-diagonal factors with permutations between them.

With b blocks, W [out, in] applies b blocks [q, in/b] to the b parts of x, q = min(out, in) / b, gives the result's
element m = ρ · b + λ to block λ as its ρ-th input, and applies b blocks [out/b, q]; element s of block λ is element
s · b + λ of the output. So each of the b² blocks (every b-th row, a part of the columns) has rank q / b, and W has
q · (in + out) numbers. Here it is a weight like any other, computed from them, so that any layout trains it; the
products stay dense. Its entries start with the standard deviation that `model.init` gives a plain matrix.

Source: Dao et al., Monarch (arXiv 2204.00595), section 3; their code pads sizes that the blocks do not divide, and
draws both factors as linear layers' weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.weights.factors.factors import Factor
from sparsecod_megatron.mechanisms.weights.factors.mechanism import Factored


@dataclass
class Monarch(Factored):
    """Settings of the mechanism."""

    name: ClassVar[str] = "monarch"

    blocks: int = at_least(2, 4)
    """b: blocks of either factor."""

    def factors(self, kind: ParameterKind) -> tuple[Factor, ...]:
        """The outer blocks, a row for each row of W, and the inner ones, a row for each of their outputs.

        Split by columns of W, a rank has some of the inner blocks, and those inputs of the outer ones that they give.
        """
        rows, columns = kind.shape
        inputs, by_rows = self._inputs(kind), kind.dimension == 0
        return (
            Factor("outer", (rows, inputs), 0 if by_rows else 1),
            Factor("inner", (self.blocks * inputs, columns // self.blocks), None if by_rows else 0),
        )

    def composed(self, kind: ParameterKind, parts: Mapping[str, Tensor]) -> Tensor:
        """W[s b + λ, κ p + π] = Σ_ρ outer[s b + λ, κ q/b + ρ] · inner[κ q + ρ b + λ, π]."""
        outer, inner = parts["outer"], parts["inner"]
        rank = self._inputs(kind) // self.blocks
        outer = outer.unflatten(1, (-1, rank)).unflatten(0, (-1, self.blocks))
        inner = inner.unflatten(0, (-1, rank, self.blocks))
        return torch.einsum("slkr,krlp->slkp", outer, inner).flatten(2, 3).flatten(0, 1)

    def drawn(self, kind: ParameterKind, factor: Factor, std: float, generator: torch.Generator) -> Tensor:
        """Normal; the inner blocks keep the size of what they multiply."""
        width, rank = kind.shape[1] // self.blocks, self._inputs(kind) // self.blocks
        scale = 1 / math.sqrt(width) if factor.name == "inner" else std * math.sqrt(width / rank)
        return torch.empty(factor.shape, device=generator.device).normal_(std=scale, generator=generator)

    def size_problems(self, kind: ParameterKind, ranks: int) -> Iterator[str]:
        """Sizes that the blocks do not divide, of whole matrices and of a rank's."""
        rows, columns = kind.shape
        stacked = kind.stacked * ranks if kind.dimension == 0 else 1
        wrong = [size for size in (rows // stacked, columns) if size % self.blocks]
        if wrong or min(rows, columns) % self.blocks**2:
            on_ranks = f" on {ranks} tensor-parallel ranks" if ranks > 1 else ""
            why = f"does not divide {kind.name} {list(kind.shape)}{on_ranks}, whose smaller size needs its square"
            yield f"{self.key('blocks')}: {self.blocks} {why}; change blocks or that size"
        elif kind.dimension == 1 and self.blocks % ranks:
            why = f"of {kind.name} cannot be shared by {ranks} tensor-parallel ranks"
            yield f"{self.key('blocks')}: {self.blocks} {why}; make it a multiple"

    def made_small(self, model: ModelConfig, small: ModelConfig) -> Monarch:
        """Two blocks, which divide every small size."""
        return replace(self, blocks=2)

    def _inputs(self, kind: ParameterKind) -> int:
        """q."""
        return min(kind.shape) // self.blocks
