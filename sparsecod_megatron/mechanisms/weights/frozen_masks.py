"""Masks that weights bring along: what is zero when a run begins stays zero, as a pruned model's weights must.

The mask is W ≠ 0 of the weights that `checkpoint.init_from` takes, an imported directory's too, which keeps no mask but
its zeros. `prune` makes zeros first where there are none: the smallest of each n:m group. From then on the masks are
the checkpoint's, like those of any method here.

Source: Kurtic et al., Sparse Fine-tuning for Inference Acceleration of Large Language Models (arXiv 2310.06927).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.weights.engine.marks import ZeroedWeights
from sparsecod_megatron.mechanisms.weights.engine.patterns import indivisible_groups, parsed_pattern, smallest_of_each
from sparsecod_megatron.mechanisms.weights.engine.settings import WeightMechanism
from sparsecod_megatron.seams.plugin import StepContext, StepParts

if TYPE_CHECKING:
    from sparsecod_megatron.model.matrices import Shard

logger = logging.getLogger("sparsecod")


@dataclass
class FrozenMasks(WeightMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "frozen_masks"

    prune: str = ""
    """n:m: of every m neighbours along a matrix's input the n largest stay when the run begins; empty: the zeros that
    there are."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """And groups that matrices or their shards cannot hold."""
        yield from super().problems(config)
        if self.prune:
            rows = [matrix.row for matrix in self.matrices(ParameterTable.of(config))]
            yield from indivisible_groups(self.key("prune"), self.prune, rows, config)

    def n_and_m(self) -> tuple[int, int]:
        """The pattern that is certain before weights are seen; n = m is none."""
        return (parsed_pattern(self.prune) if self.prune else None) or (1, 1)

    def live_counts(self, table: ParameterTable, context: StepContext) -> list[float]:
        """As far as settings say; what is zero already is known to the run alone."""
        n, m = self.n_and_m()
        return [matrix.size * n / m for matrix in self.matrices(table)]

    def leaves_out(self, table: ParameterTable) -> bool:
        """What was zero when the run began."""
        return True

    def zero_pattern(self, layer: int, context: StepContext) -> tuple[int, int] | None:
        """That of `prune`."""
        return self.n_and_m() if self.prune and layer not in self.skip_layers else None

    def plugin(self, parts: StepParts) -> ZerosThatStay:
        """Holds the zeros."""
        return ZerosThatStay(self, parts)


class ZerosThatStay(ZeroedWeights):
    """Marks what is zero.

    Args:
        settings: of the run.
        parts: what it acts on.
    """

    settings: FrozenMasks

    def __init__(self, settings: FrozenMasks, parts: StepParts) -> None:
        super().__init__(settings, parts)
        self._counted = False

    def weights_replaced(self) -> None:
        """And count again before the next step."""
        super().weights_replaced()
        self._counted = False

    def initial_marks(self, index: int, shard: Shard) -> Tensor | None:
        """Zeros, and what `prune` leaves out. Local: its groups lie within the shard."""
        weight = shard.parameter.detach()
        n, m = self.settings.n_and_m()
        return smallest_of_each(weight, n, m) | (weight == 0) if n < m else weight == 0

    @torch.no_grad()
    def on_gradients(self, context: StepContext) -> None:
        """Count, once for these weights, and mask gradients. Collective over all processes."""
        if not self._counted:
            self._count()
        super().on_gradients(context)

    def _count(self) -> None:
        sizes = [matrix.size for matrix in self.places.matrices]
        dead = torch.zeros(len(sizes), dtype=torch.int64, device=self.places.device)
        for piece in self.places.pieces:
            dead[piece.index] += piece.marked.count_nonzero()
        dist.all_reduce(dead)
        self.live = [float(size - count) for size, count in zip(sizes, dead.tolist(), strict=True)]
        self._counted = True
        total, zeros = sum(sizes), int(dead.sum())
        if not zeros:
            logger.warning("mechanisms.%s: no weight is zero, so nothing is held; see checkpoint.init_from", self.name)
        elif dist.get_rank() == 0:
            share = zeros / total
            logger.info("mechanisms.%s: %d of %d weights stay zero (%.4f)", self.name, zeros, total, share)
