"""CompleteP and depth-μP: branches, learning rates, decay and Adam's ε by depth.

With m = L / `base_num_layers`, and r = `model.width_ratio` (1 without `model.mup_base_hidden_size`, whose rules for
initial values and learning rates stay as they are):

    x ← x + m^-α · f                                              α = 1: CompleteP; α = ½: depth-μP
    learning rate of all in a layer     × m^(α - 1)               norms and biases too
    ε of all in a layer                 × m^-α
    ε                                   × 1 / r                   but output layer, routers and QK norms: × 1
    weight decay where muP divides lr   × r                       so that lr · decay is as it was tuned

ε follows the size of gradients, by α in a layer and by the width. The paper multiplies logits by 1 / r where this
package draws a smaller output layer with a lower rate: the same model whose output layer has gradients, ε and decay as
here. Gradients of a QK norm add up over heads, whose number grows with the width; those of routers, too, are sums over
channels (own derivation). It is a mechanism, not a key beside muP's, because its multiplier is a residual path, of
which a run has one: that of `scaled`, into whose stock classes it is exported.

Source: Dey et al., CompleteP (arXiv 2505.01618), formulas by its code, EleutherAI/nanoGPT-mup, branch completep, which
has one ε for all; Mlodozeniec et al. (arXiv 2512.22382), by a review, for ε of embeddings and QK norms; Yang et al.,
depth-μP (arXiv 2310.02244).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.fields import at_least, between
from sparsecod_megatron.config.parameter_kind import RATE_FALLS_WITH_WIDTH, ParameterKind
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism
from sparsecod_megatron.mechanisms.residual.scaled import DEEP_INITS, Scaled
from sparsecod_megatron.seams.mechanism import Folds
from sparsecod_megatron.seams.residual import ResidualPath

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from torch import Tensor

_QK_NORMS = ("query_norm", "key_norm")


@dataclass
class CompleteP(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "complete_p"

    base_num_layers: int | None = at_least(1, None)
    """Depth at which the learning rate and the others were tuned."""
    alpha: float = between(0, 1, 1.0)
    """Exponent of depth in the branches' factor."""

    def depth_ratio(self, model: ModelConfig) -> float:
        """Layers over those that the hyperparameters were found at."""
        return model.num_layers / (self.base_num_layers or model.num_layers)

    def scaled(self, model: ModelConfig) -> Scaled:
        """The residual path with its factor."""
        return Scaled(branch=self.depth_ratio(model) ** -self.alpha)

    def problems(self, config: RunConfig) -> Iterator[str]:
        """No base, depth that is counted twice, and rules for another optimizer."""
        yield from super().problems(config)
        model = config.model
        if self.base_num_layers is None:
            yield f"{self.key('base_num_layers')}: not set; give the number of layers that optimizer.lr was tuned at"
        if model.init in DEEP_INITS:
            yield (
                f"model.init: {model.init} makes branches small at depth, and mechanisms.complete_p again; use "
                "model.init=normal"
            )
        if model.layernorm_scaling:
            yield (
                "model.layernorm_scaling: true makes branches small at depth, and mechanisms.complete_p again; set it "
                "to false"
            )
        if config.optimizer.optimizer != "adam":
            yield (
                f"optimizer.optimizer: {config.optimizer.optimizer}, but the learning rates and ε of mechanisms."
                "complete_p are AdamW's; use adam"
            )

    def stepped(self, kind: ParameterKind, model: ModelConfig, layer: int | None) -> ParameterKind:
        """With the factors of its place: in a layer, or at the ends of the model."""
        rate, decay, epsilon, width = kind.rate, kind.decay, kind.epsilon, model.width_ratio
        if kind.group in RATE_FALLS_WITH_WIDTH:
            decay *= width
        if kind.group not in ("output", "router") and kind.name not in _QK_NORMS:
            epsilon /= width
        if layer is not None:
            depth = self.depth_ratio(model)
            rate *= depth ** (self.alpha - 1)
            epsilon *= depth**-self.alpha
        return dataclasses.replace(kind, rate=rate, decay=decay, epsilon=epsilon)

    def residual_path(self, model: ModelConfig) -> ResidualPath:
        """A stream whose branches have the factor."""
        return self.scaled(model).residual_path(model)

    def made_small(self, model: ModelConfig, small: ModelConfig) -> CompleteP:
        """With about the same ratio of depths."""
        return dataclasses.replace(self, base_num_layers=max(1, round(small.num_layers / self.depth_ratio(model))))

    def folded(self, table: ParameterTable, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """With the factor in the output projections."""
        return self.scaled(table.model).folded(table, tensors)

    def fold(self, model: ModelConfig, whole: GPTModel) -> None:
        """Leave joins without the factor."""
        self.scaled(model).fold(model, whole)

    def export(self, model: ModelConfig) -> Folds:
        """The plain class: a factor folds into every pre-norm model."""
        return Folds()
