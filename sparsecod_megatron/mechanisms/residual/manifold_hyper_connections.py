"""Hyper-connections whose mixing is doubly stochastic: x ← M x + H_post f, a branch reads Σ_s H_pre,s x_s.

With u the whole state over its RMS: H_pre = σ(scale · W u + b), H_post = 2σ(…), and M from logits by Sinkhorn's
iteration (columns exact, rows off by up to 3 %) or as a mean of permutations, which is exact. As columns sum to one,
the mean of the streams moves as the plain residual stream does, whatever M: this does not stop its variance from
growing.

Three public codes begin in three ways: M = I (`mix_init: identity`), all streams equal after one layer (`mean`,
Megatron-LM's), and 0.475 on the diagonal (lucidrains'). The first two are here.

All streams begin equal, so W is drawn, by Glorot's rule as in Megatron-LM: at 0 they would stay equal, and n would be
one.

Source: Xie et al., mHC (arXiv 2512.24880); mHC-lite (arXiv 2601.05732) for permutations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least, choice
from sparsecod_megatron.config.parameter_kind import NEVER_DECAYS
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.mechanisms.residual.reports import STREAM_NAMES, StreamReports, mixing_reports
from sparsecod_megatron.seams.mechanism import RankShape, ResidualState

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

    from sparsecod_megatron.seams.plugin import Plugin

MAX_PERMUTED_STREAMS = 4
"""Five streams have 120 permutations, each a row of the projection."""


@dataclass
class ManifoldHyperConnections(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "manifold_hyper_connections"

    streams: int = at_least(2, 4)
    """Residual streams, n."""
    mixing: str = choice("sinkhorn", "permutations")
    """How a doubly stochastic matrix is made of logits."""
    mix_init: str = choice("identity", "mean")
    """What it begins as."""
    sinkhorn_steps: int = at_least(1, 20)
    """How often rows and columns are each divided by their sums."""
    scale: float = at_least(0, 0.01)
    """What the scales of the parts that depend on the token begin at."""

    def initialize(self, chunk: GPTModel, shards: Mapping[Any, Any], seed: int) -> None:
        """Draw the projections: at 0 streams that begin equal would stay equal, whatever is learned."""
        import torch

        from sparsecod_megatron.model.matrices import named_generator

        for parameter, shard in shards.items():
            if shard.row.group == NEVER_DECAYS:
                generator = named_generator(f"{seed} {shard.matrix.name}", parameter.device)
                with torch.no_grad():
                    torch.nn.init.xavier_normal_(parameter, generator=generator)

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """The streams."""
        return ResidualState(self.streams)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Too many permutations."""
        yield from super().problems(config)
        if self.mixing == "permutations" and self.streams > MAX_PERMUTED_STREAMS:
            yield (
                f"mechanisms.{self.name}.streams: {self.streams} have {math.factorial(self.streams)} permutations; "
                f"give at most {MAX_PERMUTED_STREAMS}, or mixing=sinkhorn"
            )

    def reads(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Gates; none for the mean at the end."""
        if sublayer == 2 * model.num_layers:
            return ()
        return (
            StreamParameter("weight", (self.streams, self.streams * model.hidden_size)),
            StreamParameter("bias", (self.streams,)),
            StreamParameter("scale", (1,)),
        )

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Gates and mixing logits."""
        streams = self.streams
        logits = streams**2 if self.mixing == "sinkhorn" else math.factorial(streams)
        return (
            StreamParameter("weight", (streams + logits, streams * model.hidden_size)),
            StreamParameter("write_bias", (streams,)),
            StreamParameter("mixing_bias", (logits,)),
            StreamParameter("scales", (2,)),
        )

    def kept_by_read(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The state, its RMS, and of each stream logit and gate; the mean at the end keeps nothing."""
        if sublayer == 2 * model.num_layers:
            return 0
        return self.streams * (model.hidden_size * rank.value_bytes + 2 * 4) + 4

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The branch, the RMS, gates, all logits, what the matrix is made of, and the matrix."""
        streams = self.streams
        logits = streams**2 if self.mixing == "sinkhorn" else math.factorial(streams)
        numbers = 3 * streams + 1 + 2 * logits + streams**2
        return model.hidden_size * rank.value_bytes + numbers * 4

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> StreamReports:
        """How far streams are mixed, and how alike they are."""
        return StreamReports(models, STREAM_NAMES, mixing_reports)
