"""Gradual magnitude pruning while pretraining: dense at first, then ever fewer weights, then the mask that remains.

Compute decides when: pruned weights cost less, so that 25 % of the compute comes before 25 % of the steps. A dead
weight never comes back. What counts for the loss is N̄, the parameters that lived on average, which metrics.jsonl has.

Source: Jin et al., The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling
Laws (arXiv 2501.12486): 25 to 75 % of the compute; the cubic ramp is Zhu & Gupta's (arXiv 1710.01878).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.fields import at_least, between, choice
from sparsecod_megatron.mechanisms.weights.engine.marks import ZeroedWeights
from sparsecod_megatron.mechanisms.weights.engine.schedules import is_choice, ramp, step_of_share, steps_of_compute
from sparsecod_megatron.mechanisms.weights.engine.selection import largest, magnitude_keys
from sparsecod_megatron.mechanisms.weights.engine.settings import CountedMechanism
from sparsecod_megatron.seams.plugin import StepContext, StepParts


@dataclass
class Journey(CountedMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "journey"

    density: float = field(default=0.2, metadata={"above": 0, "maximum": 1})
    """Share of weights that live in the end, of all matrices with masks."""
    scope: str = choice("matrix", "global")
    """`matrix`: each has its own count, by `distribution`. `global`: the smallest of all matrices die."""
    start: float = between(0, 1, 0.25)
    """Share of the run before the first weight dies."""
    end: float = between(0, 1, 0.75)
    """Share of it after which none dies any more."""
    unit: str = choice("compute", "steps")
    """What both are shares of."""
    ramp: str = choice("cubic", "linear")
    """How sparsity rises between them."""
    interval: int = at_least(1, 100)
    """Steps from one choice to the next."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And ramps that cannot be."""
        yield from super().problems(config)
        if self.start > self.end:
            yield f"{self.key('start')}: {self.start} is above {self.key('end')}={self.end}; lower it"
        if self.scope == "global" and self.distribution != "uniform":
            yield f"{self.key('distribution')}: {self.distribution} means nothing with scope=global; remove it"
        if self.unit == "compute" and config.train.rampup_batch_size:
            yield f"{self.key('unit')}: compute, but train.rampup_batch_size makes steps unequal; use steps"

    def way(self) -> tuple[float, float]:
        """Shares of the steps at which the ramp begins and ends."""
        if self.unit == "steps" or self.density == 1:
            return self.start, self.end
        return steps_of_compute(self.start, self.end, sparsity=1 - self.density, kind=self.ramp)

    def share(self, context: StepContext) -> float:
        """By the ramp."""
        start, end = self.way()
        return ramp(context.progress, start=start, end=end, kind=self.ramp)

    def plugin(self, parts: StepParts) -> GradualMasks:
        """Prunes."""
        return GradualMasks(self, parts)


class GradualMasks(ZeroedWeights):
    """The smallest die.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: Journey

    def __init__(self, settings: Journey, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self._way = settings.way()

    def is_due(self, context: StepContext) -> bool:
        """Every `interval` steps of the ramp, and at its end."""
        first, last = (step_of_share(share, context) for share in self._way)
        return is_choice(context.step, first=first, last=last, interval=self.settings.interval)

    def chosen(self, context: StepContext) -> list[Tensor]:
        """All but the largest of those that live. Collective over all processes."""
        pieces, counts = self.places.pieces, [round(n) for n in self.settings.live_counts(self.table, context)]
        is_global = self.settings.scope == "global"
        rows = [0 if is_global else piece.index for piece in pieces]
        wanted = self.places.counts([sum(counts)] if is_global else counts)
        keys = [magnitude_keys(piece.master, ~piece.marked) for piece in pieces]
        return [~alive for alive in largest(keys, rows, wanted, self.places.positions)]
