"""DenseFormer: behind layer i, x ← Σ_j α_ij X_j over the outputs X_j of all layers so far, X_0 the embedding.

α_i begins as one for the layer's own output and 0 for the others, the plain model bit for bit. `dilation` k averages
outputs j ≡ i (mod k) alone, `period` p averages behind every p-th layer.

Source: Pagliardini et al., DenseFormer (arXiv 2402.02622); epfml/DenseFormer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.fields import at_least
from sparsecod_megatron.mechanisms.residual.base import ResidualMechanism, StreamParameter
from sparsecod_megatron.seams.mechanism import RankShape, ResidualState


@dataclass
class DenseAverageResiduals(ResidualMechanism):
    """Settings of the mechanism."""

    name: ClassVar[str] = "dense_average"

    dilation: int = at_least(1, 1)
    """Outputs that are averaged lie this many layers apart."""
    period: int = at_least(1, 1)
    """Layers between two averages."""

    def residual_state(self, model: ModelConfig) -> ResidualState:
        """The stream, the embedding and every output but the last."""
        return ResidualState(model.num_layers + 1)

    def joins(self, model: ModelConfig, sublayer: int) -> tuple[StreamParameter, ...]:
        """Weights of the outputs, behind an MLP."""
        from sparsecod_megatron.mechanisms.residual.dense_average_sparsecod import averaged

        layer, is_mlp = divmod(sublayer, 2)
        count = len(averaged(layer, self.dilation, self.period)) if is_mlp else 0
        return (StreamParameter("weights", (count,), products=count * model.hidden_size),) if count else ()

    def layers_differ(self, model: ModelConfig) -> bool:
        """Later layers average more."""
        return True

    def kept_by_read(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """The outputs beside the stream that is read."""
        return model.num_layers * model.hidden_size * rank.value_bytes

    def kept_by_join(self, model: ModelConfig, rank: RankShape, sublayer: int) -> int:
        """A layer's output, where it is averaged."""
        return model.hidden_size * rank.value_bytes if self.joins(model, sublayer) else 0
