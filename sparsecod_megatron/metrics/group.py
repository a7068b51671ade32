"""What a group of layer statistics is: sums added while a step runs, and the statistics that follow from them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from sparsecod_megatron.metrics.accumulator import LayerAccumulator

Statistics = dict[str, float | list[float]]
"""One layer's statistics by name, as they stand in layer_statistics.jsonl."""


class StatisticsGroup(Protocol):
    """One key of the configuration's `statistics` section.

    Attributes:
        names: the sums it adds, its own part of the accumulator.
        maxima: the values it takes the largest of.
    """

    names: tuple[str, ...]
    maxima: tuple[str, ...]

    def collecting(self, sums: LayerAccumulator) -> AbstractContextManager[None]:
        """Observe one optimizer step, adding to `sums`; must not wait for the device. Every rank calls it alike."""

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics from the global means (and maxima) of `names`; called on every rank alike."""
