"""Multi-gate residuals: n streams; a branch reads Σ_s a_s x_s, and x_s ← (1 - β_s) x_s + β_s f.

a = softmax_s(w · RMS(x_s) / √H), β_s = σ(w' · RMS(x_s) / √H + b_s), with w = w' = 0 at first. Every stream stays
within the largest branch, so nothing grows with depth. A bias b = -ln(√(L/21) (1 + e³) - 1), L branches, makes shares
fall with √L. Streams with equal biases stay equal forever, whatever is learned: n of them would be one, so biases
are spread.

Source: Multi-Gate Residuals (arXiv 2605.23259), formulas by the documentation of a public implementation. That prints
the bias with another sign, which would open the gates: the one here is derived from what it is said to do; the spread
of biases is ours, as the paper's way could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.mechanisms.residual.reports import StreamReports, gate_reports
from sparsecod_megatron.seams.mechanism import RankShape, ResidualState

if TYPE_CHECKING:
    from sparsecod_megatron.seams.plugin import Plugin


@dataclass
class MultiGate(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "multi_gate"

    streams: int = at_least(1, 4)
    """Residual streams, n."""
    gate_bias: float | None = field(default=None)
    """Mean of what the gates' biases begin at; None: by depth, as above."""
    spread: float = at_least(0, 2.0)
    """Difference of the last stream's bias and the first one's at the beginning."""

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """The streams."""
        return ResidualState(self.streams)

    def reads(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """The query."""
        products = 2 * self.streams * model.hidden_size
        return (StreamParameter("query", (model.hidden_size,), products=products),)

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Query and biases of the gates."""
        products = 2 * self.streams * model.hidden_size
        return StreamParameter("query", (model.hidden_size,), products=products), StreamParameter(
            "bias", (self.streams,)
        )

    def kept_by_read(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The state, and of each stream its RMS, score and weight."""
        return self.streams * (model.hidden_size * rank.value_bytes + 3 * 4)

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The branch, and of each stream its RMS, score and gate."""
        return self.streams * 3 * 4 + model.hidden_size * rank.value_bytes

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> StreamReports:
        """How far streams move, and how alike they are."""
        return StreamReports(models, ("stream_gate", "stream_shut", "stream_cosine"), gate_reports)
