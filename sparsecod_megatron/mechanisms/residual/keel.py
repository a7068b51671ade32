"""Keel: x ← N(α · x + f(N_in(x))) with α = 2L, the number of branches; both norms learn.

The gradient that passes a join by its stream is (1 + 1/α²)^-½ of what comes, 0.995 after 96 joins, where plain post-
norm leaves 4e-15; the stream's variance is 1 at every depth, and neighbours have the cosine α / √(α² + 1). One branch
is 1/α of the stream, so a deep model needs an fp32 state: in bf16 smaller changes round away.

Source: Chen and Wei, Post-LayerNorm Is Back (arXiv 2601.19895). Only its abstract and reviews of it could be had: the
formula and α are a review's; whether its first layer stays pre-norm could not be read, and here all layers are alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import above, choice
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.seams.mechanism import RankShape, ResidualState

MAX_ALPHA_IN_BF16 = 256
"""From here on a branch of 1/α is below the spacing of bf16, 2^-8, and what it adds is rounded away."""


@dataclass
class Keel(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "keel"
    has_own_norms: ClassVar[bool] = True

    alpha: float | None = above(0, None)
    """Factor on the stream; None is the number of branches, two per layer."""
    state_dtype: str = choice("params", "fp32")
    """Type of the residual stream between layers: `precision.dtype`, or fp32 whatever that is."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """A stream in bf16 that forgets."""
        yield from super().problems(config)
        alpha = self.alpha or 2 * config.model.num_layers
        if config.precision.dtype == "bf16" and self.state_dtype == "params" and alpha >= MAX_ALPHA_IN_BF16:
            yield (
                f"mechanisms.keel.state_dtype: params is bf16, in which a branch of 1/{alpha:g} of the stream is "
                "rounded away; set it to fp32"
            )

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """The stream."""
        return ResidualState(in_fp32=self.state_dtype == "fp32")

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """The norm's weight."""
        return (StreamParameter("weight", (model.hidden_size,), is_norm=True),)

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """What the norm keeps."""
        return rank.norm_bytes
