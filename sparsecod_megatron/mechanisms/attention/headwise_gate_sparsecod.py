"""Gates of heads in an exported model: `SparsecodAttention` multiplies by as many values as `g_proj` gives."""

from __future__ import annotations

from typing import Any

from torch import nn


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Give a layer's attention the projection of its gates, one value per head."""
    layer.self_attn.g_proj = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
