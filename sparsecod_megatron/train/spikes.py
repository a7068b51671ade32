"""Spikes of loss and gradient norm: values far above a rolling median, by a spread that the spikes do not widen."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

MAD_TO_STANDARD_DEVIATION = 1.4826
"""1 / Φ⁻¹(3/4): a normal distribution's standard deviation over its median absolute deviation."""
SPREAD_FLOOR = 1e-3
"""Share of the median that counts as its least spread; otherwise every change of a steady value were a spike."""


def deviation(value: float, history: Sequence[float]) -> float:
    """How many standard deviations `value` lies above the median of `history`, both robust.

    Args:
        value: the newest.
        history: those before it, at least one.

    Returns:
        (value − median) / max(1.4826 · MAD, 0.001 · |median|); 0 if all of them are 0.
    """
    median = statistics.median(history)
    spread = MAD_TO_STANDARD_DEVIATION * statistics.median([abs(earlier - median) for earlier in history])
    spread = max(spread, SPREAD_FLOOR * abs(median))
    if spread == 0:
        return 0.0 if value == median else float("inf")
    return (value - median) / spread


class SpikeMonitor:
    """Remembers the last values of what it watches. Spikes enter its window too, so that a new level becomes normal.

    Args:
        names: what is watched.
        window: values remembered of each; nothing is a spike before there are as many. 0 remembers none.
        threshold: deviations above the median from which a value is a spike.
    """

    def __init__(self, names: Sequence[str], *, window: int, threshold: float) -> None:
        self._window, self._threshold = window, threshold
        self._history: dict[str, deque[float]] = {name: deque(maxlen=window) for name in names}

    def observe(self, values: Mapping[str, float]) -> bool:
        """Remember one step's finite values. Local.

        Returns:
            Whether any of them is a spike among those before it.
        """
        spikes = [self._is_spike(value, self._history[name]) for name, value in values.items()]
        for name, value in values.items():
            self._history[name].append(value)
        return any(spikes)

    def _is_spike(self, value: float, history: deque[float]) -> bool:
        full = self._window > 0 and len(history) == self._window
        return full and deviation(value, history) > self._threshold

    def state(self) -> dict[str, list[float]]:
        """The remembered values, oldest first; JSON keeps them exactly."""
        return {name: list(values) for name, values in self._history.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        """Continue from `state()`; only the newest values of a longer window are kept."""
        for name, values in self._history.items():
            values.clear()
            values.extend(state.get(name, ()))
