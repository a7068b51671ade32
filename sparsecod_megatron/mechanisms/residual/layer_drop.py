"""LayerDrop: in each step some layers add nothing, the later the more often; a negative control of depth scores.

A layer that is left out in a step hands its residual stream on; in the others its branches count 1 / (1 - p), so that
the mean stays. It trains models whose layers can be skipped, so `skip_loss` falls by design, whatever depth is used
for.

    linear        p_l = rate · l / (L - 1)
    exponential   p_l = rate · (2^(l / (L - 1)) - 1), LayerSkip's
    constant      p_l = rate

A layer is drawn for the whole global batch of a step, from `seed`, the step and the layer: the same in every
layout, in recomputed passes and after a resume. LayerSkip draws for each sample. Branches are computed all the same, so
no time is saved. Validation and exports have all layers.

Source: Huang et al., stochastic depth (arXiv 1603.09382); Fan et al., LayerDrop (arXiv 1909.11556); Elhoushi et al.,
LayerSkip (arXiv 2404.16710), whose exponent is from memory of it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.fields import at_least, choice, from_to_below
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism
from sparsecod_megatron.seams.mechanism import Folds
from sparsecod_megatron.seams.plugin import Plugin, StepContext, StepParts
from sparsecod_megatron.seams.residual import ResidualPath


@dataclass
class LayerDrop(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "layer_drop"
    shapes_weights: ClassVar[bool] = False
    placements: ClassVar[tuple[str, ...]] = ("pre", "peri", "sandwich")

    rate: float = from_to_below(0, 1, 0.1)
    """Probability of the last layer, p."""
    by_depth: str = choice("linear", "exponential", "constant")
    """How it grows with the layer."""
    seed: int = at_least(0, 0)
    """Which layers are drawn."""

    def probability(self, model: ModelConfig, layer: int) -> float:
        """How often a layer (from 0) is left out of a step."""
        depth = layer / max(model.num_layers - 1, 1)
        return self.rate * {"linear": depth, "exponential": 2**depth - 1, "constant": 1.0}[self.by_depth]

    def factor(self, model: ModelConfig, layer: int, step: int) -> float:
        """What its branches count in a step."""
        probability = self.probability(model, layer)
        digest = hashlib.sha256(f"layer_drop {self.seed} {step} {layer}".encode()).digest()
        drawn = int.from_bytes(digest[:8], "little") / 2**64
        return 0.0 if drawn < probability else 1 / (1 - probability)

    def residual_path(self, model: ModelConfig) -> ResidualPath:
        """The plain stream, with joins that a step may shut."""
        from sparsecod_megatron.mechanisms.residual.layer_drop_join import DropPath

        return DropPath()

    def plugin(self, parts: StepParts) -> Plugin:
        """What shuts them."""
        return Drops(self, parts)

    def export(self, model: ModelConfig) -> Folds:
        """All layers, as they are."""
        return Folds()


class Drops(Plugin):
    """Sets the joins of each layer for the passes of a step that trains.

    Args:
        drop: its settings.
        parts: models of this rank.
    """

    def __init__(self, drop: LayerDrop, parts: StepParts) -> None:
        self.name = drop.name
        self._drop, self._model = drop, parts.config.model
        self._layers = [layer for model in parts.models for layer in model.decoder.layers]

    @contextlib.contextmanager
    def extra_loss(self, context: StepContext, num_microbatches: int) -> Iterator[None]:
        """The step's factors; all layers count again behind it. Local."""
        joins = [(layer, (layer.self_attn_bda.write, layer.mlp_bda.write)) for layer in self._layers]
        for layer, writes in joins:
            factor = self._drop.factor(self._model, layer.layer_number - 1, context.step)
            for write in writes:
                write.factor = factor
        try:
            yield
        finally:
            for _, writes in joins:
                for write in writes:
                    write.factor = 1.0

    def metrics(self, context: StepContext) -> dict[str, float]:
        """layers_dropped: share of the model's layers that the step left out."""
        layers = range(self._model.num_layers)
        factors = [self._drop.factor(self._model, layer, context.step) for layer in layers]
        return {"layers_dropped": factors.count(0.0) / len(factors)}
