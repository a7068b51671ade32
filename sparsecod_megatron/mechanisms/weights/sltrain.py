"""Weights that are the sum of a low-rank and a sparse matrix: W = (α / r) · B · A + S, trained from the beginning.

B is [out, r] and A [r, in]; S has numbers at random places that are drawn once, a share δ of each row (of the matrices
that tensor parallelism cuts by columns, of each column), where the paper draws a share of the whole matrix. B starts at
zero, A and the numbers of S are uniform in ±1 / √in, whatever `model.init` says. Gradients and optimizer state are
those of (out + in) · r + δ · out · in numbers; the products stay dense.

Source: Han et al., SLTrain (arXiv 2406.02214), whose code draws as many places of the whole matrix.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.fields import above, at_least
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.mechanisms.weights.factors.computed_linear import computed_linears
from sparsecod_megatron.mechanisms.weights.factors.factors import PLACES, Factor, sparse_factor
from sparsecod_megatron.mechanisms.weights.factors.mechanism import Factored

if TYPE_CHECKING:
    from sparsecod_megatron.mechanisms.weights.factors.computed_linear import ComputedLinear
    from sparsecod_megatron.metrics.accumulator import LayerAccumulator
    from sparsecod_megatron.seams.plugin import Plugin


@dataclass
class SLTrain(Factored):
    """Settings of the mechanism."""

    name: ClassVar[str] = "sltrain"
    sparse: ClassVar[tuple[str, ...]] = ("sparse",)

    rank: int = at_least(1, 128)
    """r."""
    alpha: float = above(0, 32.0)
    """α: the low-rank part is scaled by α / r."""
    density: float = field(default=0.03, metadata={"above": 0, "maximum": 1})
    """δ: share of the places that S has."""

    def factors(self, kind: ParameterKind) -> tuple[Factor, ...]:
        """B, A and the numbers of S."""
        return low_rank_and_sparse(kind, self.rank, self.density)

    def composed(self, kind: ParameterKind, parts: Mapping[str, Tensor]) -> Tensor:
        """(α / r) · B · A + S."""
        return composed_sum(kind, parts, self.alpha / self.rank)

    def drawn(self, kind: ParameterKind, factor: Factor, std: float, generator: torch.Generator) -> Tensor:
        """B zero, the others uniform."""
        numbers = torch.zeros(factor.shape, device=generator.device)
        bound = 1 / math.sqrt(kind.shape[1])
        return numbers if factor.name == "low_rank_out" else numbers.uniform_(-bound, bound, generator=generator)

    def size_problems(self, kind: ParameterKind, ranks: int) -> Iterator[str]:
        """A rank that no matrix has, and an S without numbers."""
        if self.rank > min(kind.shape):
            yield f"{self.key('rank')}: {self.rank}, but {kind.name} is {list(kind.shape)}; lower it"
        if not all(all(factor.shape) for factor in self.factors(kind)):
            yield f"{self.key('density')}: {self.density} leaves no number in a row of {kind.name}; raise it"

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> SparseShare:
        """Share of the sparse part."""
        return SparseShare(self, models)

    def made_small(self, model: ModelConfig, small: ModelConfig) -> SLTrain:
        """A rank of the same share of the width, and numbers in S."""
        rank = max(1, round(self.rank * small.hidden_size / model.hidden_size))
        return replace(self, rank=rank, density=max(self.density, 2 / small.hidden_size))


def low_rank_and_sparse(kind: ParameterKind, rank: int, density: float) -> tuple[Factor, ...]:
    """B, A and S of a matrix, each cut as it is."""
    rows, columns = kind.shape
    by_rows = kind.dimension == 0
    return (
        Factor("low_rank_out", (rows, rank), 0 if by_rows else None),
        Factor("low_rank_in", (rank, columns), None if by_rows else 1),
        sparse_factor("sparse", (rows, columns), density, axis=1 if by_rows else 0, dimension=kind.dimension),
    )


def composed_sum(kind: ParameterKind, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """scale · B · A + S."""
    low_rank = scale * (parts["low_rank_out"] @ parts["low_rank_in"])
    return low_rank.scatter_add(1 if kind.dimension == 0 else 0, parts["sparse" + PLACES].long(), parts["sparse"])


class SparseShare:
    """sparse_share: ‖S‖² / (‖S‖² + ‖(α / r) B A‖²), of all the layer's matrices together.

    Args:
        mechanism: of the run.
        models: the GPTModel chunks of this rank, without wrappers.
    """

    names: tuple[str, ...] = ("sparse_share",)
    maxima: tuple[str, ...] = ()

    def __init__(self, mechanism: SLTrain, models: Sequence[Any]) -> None:
        self._scale = mechanism.alpha / mechanism.rank
        layers = [layer for model in models for layer in model.decoder.layers]
        self._places = [
            (layer.layer_number - 1, linear) for layer in layers for linear in computed_linears(layer, mechanism)
        ]

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """See the factors in the first forward pass inside the block, which has their values. Local."""
        for layer, linear in self._places:
            linear.observe_parts = partial(self._see, sums, layer, linear)
        try:
            yield
        finally:
            for _, linear in self._places:
                linear.observe_parts = None

    @torch.no_grad()
    def _see(self, sums: LayerAccumulator, layer: int, linear: ComputedLinear, parts: Mapping[str, Tensor]) -> None:
        linear.observe_parts = None
        out, into, numbers = (parts[name].float() for name in ("low_rank_out", "low_rank_in", "sparse"))
        sparse = numbers.square().sum()
        # ‖BA‖² = tr(BᵀB · AAᵀ): each rank's rows or columns give their part of it.
        low_rank = ((out.T @ out) * (into @ into.T)).sum() * self._scale**2
        sums.add(layer, "sparse_share", sparse, sparse + low_rank)

    def statistics(self, means: dict[str, float]) -> dict[str, float | list[float]]:
        """One layer's statistics; none where no matrix has factors."""
        return {"sparse_share": means["sparse_share"]} if "sparse_share" in means else {}
