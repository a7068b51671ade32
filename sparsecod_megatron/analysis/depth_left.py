"""Which depth a compression takes: how much usefulness is left in the blocks that the dense model uses least, and most.

log U of a block is the log of the loss with the block made affine over the loss (docs/DEPTH_SCORES.md). The blocks are
split into halves by the dense model's; the share left of a half is Σ log U compressed ÷ Σ log U dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsecod_megatron.analysis.compressions import USEFULNESS_BY_BLOCK, CompressionTable

HALVES = ("least", "most")
NUM_RESAMPLES = 1000
Interval = tuple[float, float, float]
"""A value, and the ends of its 95 % interval."""


def usefulness_left(table: CompressionTable) -> dict[tuple[str, str], dict[str, Interval]]:
    """The share left in each half, for each row of a table that was made with the score `usefulness`.

    Args:
        table: as it was read.

    Returns:
        (method, pattern) → half → share left, with the interval over blocks drawn with replacement. Empty where the
        dense model's blocks were not scored.
    """
    if not table.rows or USEFULNESS_BY_BLOCK not in table.rows[0]:
        return {}
    dense = _logs(table.rows[0])
    scored = [row for row in table.compressed if len(row.get(USEFULNESS_BY_BLOCK, [])) == len(dense)]
    return {(row["method"], row["pattern"]): shares_left(dense, _logs(row)) for row in scored}


def shares_left(dense: Sequence[float], compressed: Sequence[float]) -> dict[str, Interval]:
    """The share left of each half of the blocks.

    Args:
        dense: log U of every block.
        compressed: the same blocks' afterwards.
    """
    before, after = np.array(dense), np.array(compressed)
    order = before.argsort(kind="stable")
    generator, shares = np.random.default_rng(0), {}
    for half, blocks in zip(HALVES, (order[: len(order) // 2], order[len(order) // 2 :]), strict=True):
        drawn = generator.integers(len(blocks), size=(NUM_RESAMPLES, len(blocks)))
        sums = [values[blocks][drawn].sum(1) for values in (after, before)]
        low, high = np.percentile(sums[0] / sums[1], [2.5, 97.5])
        shares[half] = (float(after[blocks].sum() / before[blocks].sum()), float(low), float(high))
    return shares


def _logs(row: dict[str, Any]) -> list[float]:
    return [math.log(usefulness) for usefulness in row[USEFULNESS_BY_BLOCK]]
