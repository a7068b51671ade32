"""Thins a long series but keeps what the eye looks for: first, last, extremes and spikes.

Points are dropped, never averaged: what the page shows at a step is what the run wrote at that step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def kept_points(values: npt.NDArray[np.float64], limit: int) -> npt.NDArray[np.int64]:
    """Indices of the points to keep of series that share their steps.

    Kept are the first and last point and each series' largest and smallest. The rest of the limit is filled from equal
    stretches of the series, two points from each: where any of the series lies furthest above, and furthest below, its
    mean over the stretch, in units of its mean size there. For a single series these are the maximum and the minimum.

    Args:
        values: [points, series]; NaN and infinities are never chosen as extremes.
        limit: at most so many points, unless the extremes alone are more (2 · series + 2).

    Returns:
        [kept], increasing.
    """
    points, series = values.shape
    if points <= limit:
        return np.arange(points)
    finite = np.isfinite(values)
    kept = {0, points - 1}
    for column in range(series):
        present = np.flatnonzero(finite[:, column])
        if len(present):
            numbers = values[present, column]
            kept |= {int(present[numbers.argmax()]), int(present[numbers.argmin()])}
    num_stretches = max(0, limit - len(kept)) // 2
    edges = np.linspace(0, points, num_stretches + 1).astype(int)
    for start, stop in zip(edges[:-1], edges[1:], strict=True):
        kept |= {int(start) + peak for peak in _peaks(values[start:stop], finite[start:stop])}
    return np.array(sorted(kept))


def _peaks(values: npt.NDArray[np.float64], finite: npt.NDArray[np.bool_]) -> set[int]:
    """Points of a stretch [points, series] at which some series is furthest above, and furthest below, its mean."""
    count = np.maximum(finite.sum(axis=0), 1)
    numbers = np.where(finite, values, 0.0)
    deviation = np.where(finite, numbers - numbers.sum(axis=0) / count, 0.0)
    size = np.abs(numbers).sum(axis=0) / count
    deviation = np.divide(deviation, size, out=np.zeros_like(deviation), where=size > 0)
    return {int(deviation.max(axis=1).argmax()), int(deviation.min(axis=1).argmin())}


def evenly_spaced(points: int, limit: int) -> npt.NDArray[np.int64]:
    """At most `limit` (two or more) of the indices below `points`, first and last among them, evenly apart."""
    return np.unique(np.linspace(0, points - 1, min(points, limit)).round().astype(np.int64))
