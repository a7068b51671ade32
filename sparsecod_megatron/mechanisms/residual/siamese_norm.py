"""SiameseNorm: a post-norm stream x and a pre-norm stream y that share their branches, z = f(N_in(x + N_y(y))).

    x ← N_p(x + z / c),  c = √(2 (layer + 1));    y ← y + z;    at the end N_f(x + N_y(y))

Both begin as the embedding. A layer has six norms. x is stored normalised: N_p of a branch is the norm that the code
of the paper applies before the next one, and the first of them follows the embeddings.

Source: SiameseNorm (arXiv 2602.08064); formulas were read in Qwen-Applications/SiameseNorm, changes.patch. Its hybrid
form, in which attention reads x alone, is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.seams.mechanism import RankShape, ResidualState


@dataclass
class SiameseNorm(ResidualMechanism):
    """The two streams; it has no settings."""

    name: ClassVar[str] = "siamese_norm"
    has_own_norms: ClassVar[bool] = True

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """Both streams."""
        return ResidualState(2)

    def reads(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Norm of the pre-norm stream."""
        return (StreamParameter("weight", (model.hidden_size,), is_norm=True),)

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Norm of the post-norm stream."""
        return self.reads(model, sublayer)

    def expansion(self, model: ModelConfig) -> tuple[StreamParameter, ...]:
        """The first of them."""
        return self.reads(model, 0)

    def kept_by_expansion(self, rank: RankShape) -> int:
        """What the norm keeps."""
        return rank.norm_bytes

    def kept_by_read(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """What the norm keeps, whose input is a part of the state."""
        return rank.norm_bytes + model.hidden_size * rank.value_bytes

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """What the norm keeps."""
        return rank.norm_bytes
