"""The residual stream with factors: x ← skip · x + branch · f. The null model of every other remedy.

Constant factors are the 1 / √(2L) of a branch (variance 2 at the end in place of 1 + 2L), DeepNorm's skip (2L)^¼
under `model.norm_placement: post`; a learned scalar that begins at 0 is ReZero or SkipInit, a learned vector that
begins at 1e-4 or less is LayerScale. With skip · x = x the factor folds into the rows of the output projections, so a
pre-norm model is exported into a stock class.

Source: Bachlechner et al., ReZero (arXiv 2003.04887); De and Smith, SkipInit (arXiv 2002.10444); Touvron et al.,
LayerScale (arXiv 2103.17239); Wang et al., DeepNorm (arXiv 2203.00555), whose smaller initial values are set by
`model.init_std`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import above, at_least, choice
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.seams.mechanism import RankShape

DEEP_INITS = ("scaled", "mitchell", "small_init")
"""Values of `model.init` that make output projections smaller with depth."""


@dataclass
class Scaled(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "scaled"
    placements: ClassVar[tuple[str, ...]] = ("pre", "post", "peri", "sandwich", "mix")

    skip: float = above(0, 1.0)
    """Factor on the stream."""
    branch: float = at_least(0, 1.0)
    """Factor on the branch, or what a learned one begins at."""
    learn: str = choice("none", "scalar", "channel")
    """What is learned of the branch's factor: nothing, one number per branch, or one per channel."""
    rate: float = above(0, 1.0)
    """Factor on the learning rate of what is learned."""

    def problems(self, config: RunConfig) -> Iterator[str]:
        """Depth that is counted twice."""
        yield from super().problems(config)
        if self.branch != 1 and config.model.init in DEEP_INITS:
            yield (
                f"model.init: {config.model.init} makes branches small at depth, and mechanisms.scaled.branch="
                f"{self.branch:g} again; use model.init=normal"
            )

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """The factor."""
        if self.learn == "none":
            return ()
        size = 1 if self.learn == "scalar" else model.hidden_size
        return (StreamParameter("factor", (size,), rate=self.rate),)

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The branch, by which a learned factor has its gradient."""
        return 0 if self.learn == "none" else model.hidden_size * rank.value_bytes
