"""Sparse iso-FLOP transformations: matrices with more freedom whose numbers that are not zero are as many as before.

With sparsity s and W [out, in]:

    factorized   W = U · V, both with a share 1 − s of their numbers, of inner size out · in / ((1 − s) (out + in))
    doped        W = B · A + S, S with a share 1 − s of its numbers, of rank s · out · in / (out + in)

so that a product which skipped zeros would cost what the dense one does. Places are random, as many in every row (or
column), and stay. W is computed from the factors and multiplied densely: real time is a dense layer's. Its entries
start with the standard deviation that `model.init` gives a plain matrix.

Source: Thangarasa et al., Sparse-IFT (arXiv 2303.11525), section 3, for linear layers. There places move (RigL), by
gradients where a factor is zero, which no pass computes here; its `wide` form, whose matrix is stored, takes `rigl`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config.fields import choice, from_to_below
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.weights.factors.factors import PLACES, Factor, scattered, sparse_factor
from sparsecod_megatron.mechanisms.weights.factors.mechanism import Factored
from sparsecod_megatron.mechanisms.weights.sltrain import composed_sum, low_rank_and_sparse


@dataclass
class SparseIFT(Factored):
    """Settings of the mechanism."""

    name: ClassVar[str] = "sparse_ift"
    sparse: ClassVar[tuple[str, ...]] = ("sparse", "sparse_out", "sparse_in")

    form: str = choice("factorized", "doped")
    """How a matrix is made."""
    sparsity: float = from_to_below(0.05, 1, 0.75)
    """s: share of zeros, in both factors or in the sparse part."""

    def factors(self, kind: ParameterKind) -> tuple[Factor, ...]:
        """Two sparse matrices, or two of low rank and a sparse one."""
        rows, columns = kind.shape
        density, size = 1 - self.sparsity, rows * columns / (rows + columns)
        if self.form == "doped":
            return low_rank_and_sparse(kind, math.floor(self.sparsity * size), density)
        inner, by_rows = round(size / density), kind.dimension == 0
        return (
            sparse_factor("sparse_out", (rows, inner), density, axis=1, dimension=0 if by_rows else None),
            sparse_factor(
                "sparse_in", (inner, columns), density, axis=1 if by_rows else 0, dimension=None if by_rows else 1
            ),
        )

    def composed(self, kind: ParameterKind, parts: Mapping[str, Tensor]) -> Tensor:
        """U · V, or B · A + S."""
        if self.form == "doped":
            return composed_sum(kind, parts, 1.0)
        whole = []
        for factor in self.factors(kind):
            assert factor.axis is not None
            whole.append(scattered(parts[factor.name], parts[factor.name + PLACES], factor.axis, factor.size))
        return whole[0] @ whole[1]

    def drawn(self, kind: ParameterKind, factor: Factor, std: float, generator: torch.Generator) -> Tensor:
        """Normal; the factor next to x keeps its size, the sparse and the low-rank part share W's variance."""
        columns, density = kind.shape[1], 1 - self.sparsity
        if self.form == "doped":
            rank = self.factors(kind)[0].shape[1]
            scales = {
                "low_rank_in": columns**-0.5,
                "low_rank_out": std * math.sqrt(self.sparsity * columns / max(rank, 1)),
                "sparse": std,
            }
        else:
            inner = self.factors(kind)[0].size
            scales = {
                "sparse_in": (density * columns) ** -0.5,
                "sparse_out": std * math.sqrt(columns / (density * inner)),
            }
        return torch.empty(factor.shape, device=generator.device).normal_(std=scales[factor.name], generator=generator)

    def size_problems(self, kind: ParameterKind, ranks: int) -> Iterator[str]:
        """A matrix too small for a factor of it."""
        empty = [factor.name for factor in self.factors(kind) if not all(factor.shape)]
        if empty:
            why = f"leaves nothing of {empty[0]} in {kind.name} {list(kind.shape)}"
            yield f"{self.key('sparsity')}: {self.sparsity} {why}; change it"
