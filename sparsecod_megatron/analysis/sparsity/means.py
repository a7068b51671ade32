"""The mean of a table with a row for each matrix: what counts once, and what a missing value does.

A share, a spread or a measure of inequality is of weights, so each weight counts once: the mean over matrices weighs a
row by its elements. A rank is of a matrix, and grows with its smaller side, so each matrix counts once; weighted by
elements it would be the ranks of the widest matrices. Rows without a value (a rank of a vector, a share that two number
formats hide) are in no mean, so a mean is of the rows that have it, and None where none has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = ("layer", "kind", "name", "elements")
"""Columns that say which row it is."""


def mean_row(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of all other columns, and the sum of `elements`.

    Args:
        rows: with the same columns, at least one.
    """
    means: dict[str, Any] = {"elements": sum(row["elements"] for row in rows)}
    for name in (name for name in rows[0] if name not in NAMES):
        known = [row for row in rows if row[name] is not None]
        weights = [1 if name.endswith("_rank") else row["elements"] for row in known]
        total = sum(row[name] * weight for row, weight in zip(known, weights, strict=True))
        means[name] = total / sum(weights) if known else None
    return means
