"""Attention of the `sparsecod` architecture.

Copied as it is into an export, so it imports nothing of this package but its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_sparsecod import SparsecodConfig
from .norms_sparsecod import SparsecodRMSNorm
from .rotary_sparsecod import Rotation, rotate


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention with its weights: [batch, seq, heads, head_dim] and [batch, heads, seq, keys]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    if (sinks := getattr(module, "sinks", None)) is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[-2]]
    weights = F.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), weights


class SparsecodAttention(nn.Module):
    """Causal self-attention with grouped queries, optional norms of queries and keys, sinks, window and output gate."""

    def __init__(self, config: SparsecodConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = config.softmax_scale or config.head_dim**-0.5, True
        self.is_rotated = config.is_rotated(layer_idx)
        self.sliding_window = config.sliding_window if config.is_windowed(layer_idx) else None
        hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, config.num_key_value_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, config.num_key_value_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, hidden, bias=config.attention_output_bias)
        has_gate = config.attention_output_gate == "elementwise"
        self.g_proj = nn.Linear(hidden, width, bias=config.qkv_bias) if has_gate else None
        self.norms_heads = config.qk_norm_scope == "head"  # one by one, not together
        self.q_norm, self.k_norm = (
            SparsecodRMSNorm(config.head_dim * (1 if self.norms_heads else heads), config)
            if config.qk_norm
            else nn.Identity()
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        has_sinks = config.softmax_type == "learnable"
        self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads)) if has_sinks else None
        self.value_mix: nn.Module | None = None  # of a mechanism: what becomes of values and the first layer's

    def forward(
        self,
        x: Tensor,
        rotation: Rotation,
        mask: Tensor | None,
        cache: Cache | None = None,
        first_values: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, seq, hidden] → the same, and attention weights where the implementation has them."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.value_mix is not None:
            value = self.value_mix(value, first_values)
        query, key = self._normed(self.q_norm, query), self._normed(self.k_norm, key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if self.is_rotated:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.sliding_window}
        output, weights = attend(self, query, key, value, mask, **options, **kwargs)
        if self.g_proj is not None:
            gate = torch.sigmoid(self.g_proj(x).float()).to(output.dtype)
            output = output * gate.unflatten(-1, (self.config.num_attention_heads, -1))
        return self.o_proj(output.flatten(start_dim=-2)), weights

    def _normed(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Queries or keys [batch, seq, heads, head_dim]."""
        return norm(x) if self.norms_heads else norm(x.flatten(start_dim=-2)).unflatten(-1, (-1, self.head_dim))
