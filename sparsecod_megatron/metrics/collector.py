"""Runs the groups that are due in a step and reduces all of them at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics, StatisticsGroup


class StatisticsCollector:
    """Layer statistics of a run.

    Args:
        groups: those in use, by name.
        intervals: steps between collections of each group, at least 1.
        num_layers: layers of the whole model.
        device: device of the model.
    """

    def __init__(
        self,
        groups: Mapping[str, StatisticsGroup],
        intervals: Mapping[str, int],
        *,
        num_layers: int,
        device: torch.device,
    ) -> None:
        self._groups = dict(groups)
        self._intervals = intervals
        self._sums = LayerAccumulator(
            num_layers=num_layers,
            names=[name for group in self._groups.values() for name in group.names],
            maxima=[name for group in self._groups.values() for name in group.maxima],
            device=device,
        )

    def due(self, step: int) -> list[StatisticsGroup]:
        """Groups to collect in optimizer step `step`, counted from 1."""
        return [group for name, group in self._groups.items() if step % self._intervals[name] == 0]

    @contextlib.contextmanager
    def collecting(self, step: int) -> Iterator[None]:
        """Observe the step that runs inside the block; free if nothing is due. Local."""
        groups = self.due(step)
        if groups:
            self._sums.reset()
        with contextlib.ExitStack() as stack:
            for group in groups:
                stack.enter_context(group.collecting(self._sums))
            yield

    def reduce(self, step: int) -> list[Statistics] | None:
        """Exact statistics of every layer over the whole global batch. Collective over all processes.

        Returns:
            One dict per layer, or None if nothing was due in `step`.
        """
        groups = self.due(step)
        if not groups:
            return None
        layers: list[Statistics] = []
        for means in self._sums.reduce(maxima=any(group.maxima for group in groups)):
            statistics: Statistics = {}
            for group in groups:
                statistics.update(group.statistics(means))
            layers.append(statistics)
        return layers
