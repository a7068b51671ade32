"""Attention with one output gate per head; Megatron-Core itself has a gate of every channel."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


@dataclass
class HeadwiseGateSubmodules(SelfAttentionSubmodules):
    """SelfAttention's, and the gate's column-parallel projection."""

    linear_gate: type | None = None


class HeadwiseGatedSelfAttention(SelfAttention):
    """output = projection(concat_h(sigmoid(w_h · x) · attention_h(x))), x being the layer's normalised input.

    Megatron's forward pass takes the gate with queries, keys and values, and applies it before the output projection;
    this class supplies both steps. The norm must stand before the module: both projections read its output.

    Source: Qiu et al., Gated Attention for Large Language Models (arXiv 2505.06708).
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HeadwiseGateSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        # Megatron widens the query projection for its own gate, which this one does not need.
        without_gate = copy.copy(config)
        without_gate.attention_output_gate = False
        super().__init__(without_gate, submodules, layer_number, attn_mask_type, cp_comm_type, pg_collection)
        self.config = config
        self.linear_gate = build_module(
            submodules.linear_gate,
            config.hidden_size,
            config.num_attention_heads,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="gate",
            tp_group=self.pg_collection.tp,
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> Any:
        """Query, key, value as in the parent, and the gate's logits [S, B, heads/TP]."""
        projected = super().get_query_key_value_tensors(hidden_states, key_value_states, split_qkv=split_qkv)
        logits, _ = self.linear_gate(hidden_states)
        return (*projected, logits)

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """[S, B, heads/TP · D] and [S, B, heads/TP] → [S, B, heads/TP · D]."""
        heads = x.unflatten(-1, (gate.shape[-1], -1))
        return (heads * torch.sigmoid(gate.float()).unsqueeze(-1)).to(x.dtype).flatten(start_dim=-2)
