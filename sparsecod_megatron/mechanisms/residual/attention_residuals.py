"""Attention residuals: a branch reads Σ_i a_i v_i, a = softmax_i(w · (g ⊙ RMS(v_i))), over what was written before it.

v_0 is the embedding, v_i the sum of the i-th block of `block_layers` layers; the current block's sum so far is a
source once it has one. With queries at 0, where they begin, the read is the mean of all, which a norm turns into the
plain pre-norm stream up to its ε; it is a normalisation of the read (variance 1 / (l + 1) at the beginning), not of
what is written. Each read has 2 H parameters, but for the first, which has one source; the end is read the same way.

Source: Kimi Team, Attention Residuals (arXiv 2603.15031); the number of sources and the block form were checked
against public descriptions of it and Megatron-LM's pull request #6840.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.mechanisms.residual.reports import StreamReports, depth_reports
from sparsecod_megatron.seams.mechanism import RankShape, ResidualState

if TYPE_CHECKING:
    from sparsecod_megatron.seams.plugin import Plugin

MAX_FULL_LAYERS = 24
"""Layers beyond which each branch's own slot costs more memory than the rest of the model's activations."""


@dataclass
class AttentionResiduals(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "attention_residuals"

    block_layers: int = at_least(0, 3)
    """Layers whose outputs are summed into one source; 0: every branch is a source of its own."""

    @property
    def block_branches(self) -> int:
        """Branches of a block."""
        return 2 * self.block_layers or 1

    def sources(self, sublayer: int) -> int:
        """What a sub-layer reads: the embedding, and the blocks that have a sum by then."""
        return 1 + -(-sublayer // self.block_branches)

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """The embedding, and each block's sum."""
        return ResidualState(self.sources(2 * model.num_layers))

    def problems(self, config: RunConfig) -> Iterator[str]:
        """More sources than are worth their memory."""
        yield from super().problems(config)
        layers = config.model.num_layers
        if self.block_layers == 0 and layers > MAX_FULL_LAYERS:
            yield (
                f"mechanisms.attention_residuals.block_layers: 0 keeps {2 * layers} sources for model.num_layers="
                f"{layers}; give blocks of layers (8 blocks in the paper), or at most {MAX_FULL_LAYERS} layers"
            )

    def reads(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Query, and gain of the keys."""
        if sublayer == 0:
            return ()
        sources = self.sources(sublayer)
        shape = (model.hidden_size,)
        return StreamParameter("query", shape, products=sources * model.hidden_size), StreamParameter("key_gain", shape)

    def layers_differ(self, model: ModelConfig) -> bool:
        """The first read has no parameters."""
        return True

    def kept_by_read(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The state, and of each source its RMS, score and weight; the first read keeps the slots beside its own."""
        sources, columns = self.sources(sublayer), self.residual_state(model).columns
        if sublayer == 0:
            return (columns - 1) * model.hidden_size * rank.value_bytes
        copied = sources * rank.copy_bytes or columns * rank.value_bytes
        return copied * model.hidden_size + 3 * sources * 4

    def statistics(self, models: Sequence[Any], plugin: Plugin | None) -> StreamReports:
        """Weights of the sources, and their entropy."""
        sources = self.sources(2 * models[0].config.num_layers)
        weights = tuple(f"depth_weight_{source}" for source in range(sources))
        return StreamReports(models, ("depth_entropy", *weights), depth_reports, ("depth_weight",))
