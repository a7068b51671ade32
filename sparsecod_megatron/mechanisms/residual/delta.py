"""Deep delta learning: x ← x + β k (v - kᵀ x); what lies along the branch's direction k is replaced, not added to.

k = f / ‖f‖, β = 2σ(w_β · RMS(x) + b_β), v = 4σ(w_v · x + b_v), a number: β = 1 replaces, 2 reflects, 0 leaves.

Source: Zhang et al., Deep Delta Learning (arXiv 2601.00417), with values of one dimension; read in yifanzhang-
pro/deep-delta-learning, model/DDL-vdim1-gpt-mha-rope.py, where β sees the normalised input of the branch. Here that
norm has no weight, which w_β can take over, and both projections begin at 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.mechanisms.residual.reports import StreamReports
from sparsecod_megatron.seams.mechanism import RankShape

if TYPE_CHECKING:
    from sparsecod_megatron.seams.plugin import Plugin


@dataclass
class Delta(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "delta"

    beta: float = field(default=1.0, metadata={"above": 0, "below": 2})
    """What β begins at."""

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Both projections."""
        hidden = model.hidden_size
        return (
            StreamParameter("gate", (hidden,), products=hidden),
            StreamParameter("value", (hidden,), products=hidden),
            StreamParameter("gate_bias", (1,)),
            StreamParameter("value_bias", (1,)),
        )

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The branch and its direction, and the numbers beside them."""
        copies = 2 * model.hidden_size * 4 if rank.copy_bytes == 0 else 3 * model.hidden_size * 4
        return copies + 8 * 4

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> StreamReports:
        """How much of what lies along the branch is rewritten."""
        return StreamReports(models, ("delta_beta",), lambda beta: {"delta_beta": beta})
