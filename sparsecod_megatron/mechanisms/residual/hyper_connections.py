"""Hyper-connections: n streams; a branch reads Σ_s α_s x_s, and x_t ← Σ_s A_st x_s + B_t f.

α, A and B are each a learned matrix plus scale · tanh of a projection of the normalised streams. They begin as the
plain residual stream n times over (α reads stream l mod n, A = I, B = 1, projections 0): the first step's losses and
variances are those of the plain model, bit for bit where n is a power of two. Unconstrained products of A may
explode.

Source: Zhu et al., Hyper-Connections (arXiv 2409.19606), dynamic form; compared with lucidrains/hyper-connections, in
which read and join share one scale. The norm has no weight, which the projections can take over, and nothing decays;
the paper is said to let the projections decay, which could not be checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.mechanisms.residual.reports import STREAM_NAMES, StreamReports, mixing_reports
from sparsecod_megatron.seams.mechanism import RankShape, ResidualState

if TYPE_CHECKING:
    from sparsecod_megatron.seams.plugin import Plugin


@dataclass
class HyperConnections(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "hyper_connections"

    streams: int = at_least(2, 4)
    """Residual streams, n."""
    scale: float = at_least(0, 0.01)
    """What the scales of the parts that depend on the token begin at."""

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """The streams."""
        return ResidualState(self.streams)

    def reads(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Weights of the streams; none for the mean at the end."""
        if sublayer == 2 * model.num_layers:
            return ()
        return (
            StreamParameter("static", (self.streams,), products=self.streams * model.hidden_size),
            StreamParameter("dynamic", (model.hidden_size,), products=self.streams * model.hidden_size),
            StreamParameter("scale", (1,)),
        )

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Mixing matrix and shares."""
        streams, hidden = self.streams, model.hidden_size
        return (
            StreamParameter("static_mixing", (streams, streams), products=streams**2 * hidden),
            StreamParameter("static_write", (streams,), products=streams * hidden),
            StreamParameter("dynamic", (streams + 1, hidden), products=streams * (streams + 1) * hidden),
            StreamParameter("scales", (2,)),
        )

    def kept_by_read(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The state, and what the weights are made of; the mean at the end keeps nothing."""
        if sublayer == 2 * model.num_layers:
            return 0
        return self.streams * (model.hidden_size * rank.value_bytes + 4 * 4)

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The branch, and what matrix and shares are made of."""
        return model.hidden_size * rank.value_bytes + (3 * self.streams**2 + 4 * self.streams) * 4

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> StreamReports:
        """How far streams are mixed, and how alike they are."""
        return StreamReports(models, STREAM_NAMES, mixing_reports)
