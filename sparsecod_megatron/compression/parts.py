"""A few rows of a matrix at a time, so that what is computed of them on the way takes little memory beside it."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

MAX_ELEMENTS = 2**20
"""Elements of a part, unless its rows are very long."""
MIN_ROWS = 256
"""Rows of a part at least: products with fewer are slow."""
STEP = 64
"""Larger parts have a multiple of this many rows, so that a BLAS adds products up as it does for the whole matrix."""


def row_parts(matrix: Tensor) -> Iterator[slice]:
    """Consecutive rows of `[rows, ...]`, all of them in turn."""
    rows = len(matrix)
    size = max(MIN_ROWS, MAX_ELEMENTS * rows // matrix.numel() // STEP * STEP)
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
