"""The small parameters that a matrix is computed from, dense ones and sparse ones whose zeros are not stored.

A sparse factor keeps as many numbers in each of its rows (or columns), at places that are drawn once and stay. So it is
as small as its numbers, is cut as any matrix is along its other dimension, and its places are cut with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PLACES = "_places"
"""Behind a sparse factor's name: where in the matrix its numbers stand."""


@dataclass(frozen=True)
class Factor:
    """A parameter that a matrix is computed from.

    Attributes:
        name: in its linear layer.
        shape: of the whole parameter.
        dimension: that is split when the matrix is split over tensor-parallel ranks; None: each holds it whole.
        axis: of a sparse factor, along which its numbers stand at random places; None: it is dense.
        size: of the sparse factor along that axis.
    """

    name: str
    shape: tuple[int, int]
    dimension: int | None
    axis: int | None = None
    size: int = 0


def sparse_factor(name: str, shape: tuple[int, int], density: float, *, axis: int, dimension: int | None) -> Factor:
    """A sparse factor of `shape`, with a share `density` of every row (axis 1) or of every column (axis 0)."""
    numbers = list(shape)
    numbers[axis] = round(density * shape[axis])
    return Factor(name, (numbers[0], numbers[1]), dimension, axis, shape[axis])


def scattered(numbers: Tensor, places: Tensor, axis: int, size: int) -> Tensor:
    """A sparse factor as a dense matrix of `size` along `axis`."""
    shape = list(numbers.shape)
    shape[axis] = size
    return numbers.new_zeros(shape).scatter(axis, places.long(), numbers)


def random_places(factor: Factor, generator: torch.Generator) -> Tensor:
    """Distinct places of a sparse factor's numbers, in order along its axis, each choice as likely as any other."""
    assert factor.axis is not None
    lines, count = factor.shape[1 - factor.axis], factor.shape[factor.axis]
    scores = torch.rand(lines, factor.size, generator=generator, device=generator.device)
    places = scores.topk(count, dim=1, sorted=False).indices.sort(dim=1).values.int()
    return places if factor.axis == 1 else places.T
