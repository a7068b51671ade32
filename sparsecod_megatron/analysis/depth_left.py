"""Which depth a compression takes: how much usefulness is left in the blocks that the dense model uses least, and most.

log U of a block is the log of the loss with the block made affine over the loss (docs/DEPTH_SCORES.md). The blocks are
split into halves by the dense model's; the share left of a half is Σ log U compressed ÷ Σ log U dense.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import numpy as np

from sparsecod_megatron.analysis.compressions import DENSE, CompressionTable
from sparsecod_megatron.analysis.directory import SCORES_FILE

HALVES = ("least", "most")
NUM_RESAMPLES = 1000
Interval = tuple[float, float, float]
"""A value, and the ends of its 95 % interval."""


def usefulness_left(table: CompressionTable) -> dict[tuple[str, str], dict[str, Interval]]:
    """The share left in each half, for each row of a table whose analyses lie beside it with the score `usefulness`.

    Args:
        table: as it was read.

    Returns:
        (method, pattern) → half → share left, with the interval over blocks drawn with replacement. Empty where the
        dense model's blocks were not scored.
    """
    dense = _logs(table, DENSE)
    if dense is None:
        return {}
    found = {}
    for row in table.compressed:
        method, pattern = row["method"], row["pattern"]
        logs = _logs(table, f"{method}_{pattern.replace(':', '-')}" if pattern else method)
        if logs is not None and len(logs) == len(dense):
            found[method, pattern] = shares_left(dense, logs)
    return found


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


def _logs(table: CompressionTable, name: str) -> list[float] | None:
    path = table.path / "analysis" / name / SCORES_FILE
    if not path.is_file():
        return None
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]
    if "usefulness" not in scores:
        return None
    return [math.log(row["usefulness"]) for row in scores["usefulness"]["tables"]["usefulness"]]
