"""Tables in place of up projections in an exported model's MLPs, as `stem.py` trains them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Give the MLP of a layer its table."""
    layers = settings["layers"]
    every_second = index % 2 == 1 and not config.is_moe_layer(index)
    if every_second if layers is None else index in layers:
        layer.mlp = StemMLP(layer.mlp, config)
        layer.token_halo = max(0, layer.token_halo or 0)


class StemMLP(nn.Module):
    """down(act(gate(x)) · up_table[token]).

    Args:
        plain: the MLP that it replaces.
        config: of the model.
    """

    reads_tokens = True

    def __init__(self, plain: Any, config: Any) -> None:
        super().__init__()
        self.act, self.gate_proj, self.down_proj = plain.act, plain.gate_proj, plain.down_proj
        self.up_table = nn.Embedding(config.vocab_size, config.intermediate_size)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[batch, seq, hidden] and tokens as the model gives them → [batch, seq, hidden]."""
        ids = tokens[:, -x.shape[1] :, 0].clamp(min=0)  # of padding too, whose output nobody reads
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_table(ids))
