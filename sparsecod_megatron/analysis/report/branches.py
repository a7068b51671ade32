"""Branches drawn as a tree: the curve of a run that continues another begins where it left that one's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparsecod_megatron.analysis.runs import Run, Series


def grown(run: Run, runs: Sequence[Run]) -> dict[str, Series]:
    """A run's metrics, with its parent's last point before the branch in front where the parent is drawn too.

    Args:
        run: one of `runs`.
        runs: all that are drawn.
    """
    for parent in run.lineage[:1]:
        for other in runs:
            if other.path.resolve() == Path(parent.run).resolve():
                return {
                    name: _joined(other.metrics.get(name), series, parent.step) for name, series in run.metrics.items()
                }
    return run.metrics


def _joined(before: Series | None, series: Series, step: int) -> Series:
    """The second with the last point of the first up to the step in front."""
    kept = 0 if before is None else int(np.searchsorted(before.steps, step, side="right"))
    if before is None or not kept or before.steps[kept - 1] >= series.steps[0]:
        return series
    last = slice(kept - 1, kept)
    return Series(
        np.concatenate((before.steps[last], series.steps)),
        np.concatenate((before.tokens[last], series.tokens)),
        np.concatenate((before.values[last], series.values)),
    )
