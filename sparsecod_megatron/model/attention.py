"""Causal core attention through torch's scaled_dot_product_attention, for layer specs without Transformer Engine.

Megatron's DotProductAttention materialises every head's scores and refuses context parallelism.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class SDPAttention(torch.nn.Module):
    """softmax(q·kᵀ/√d + causal mask)·v with grouped queries.

    Args:
        config: dropout probability.
        layer_number: 1-based, as Megatron numbers layers; unused.
        attn_mask_type: must be causal.
        attention_type: `self`; unused.
        attention_dropout: overrides the configuration's.
        softmax_scale: overrides 1/√d.
        cp_comm_type: kind of context-parallel exchange in Transformer Engine; unused.
        pg_collection: the run's groups; `cp` is used by the subclass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, "decoder-only models attend causally"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.pg_collection = pg_collection

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """query [S, B, heads/TP, D], key and value [S, B, groups/TP, D] → [S, B, heads/TP · D]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        key, value, mask = self.visible(query, key, value)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return context.permute(2, 0, 1, 3).flatten(start_dim=2)

    def visible(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [S_key, B, groups/TP, D] that these queries see, and a mask [S, S_key] or None (causal)."""
        return key, value, None


class ContextParallelSDPAttention(SDPAttention):
    """The same over a sequence sharded by context parallelism: keys and values are gathered, queries stay.

    Rank r of n holds chunks r and 2n−1−r of 2n, which balances the causal work. The gather's gradient is a
    reduce-scatter.
    """

    def visible(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gathers [S/CP, B, groups/TP, D] to [S, B, groups/TP, D]; the mask compares positions. Collective (`cp`)."""
        assert self.pg_collection is not None
        group = self.pg_collection.cp
        gathered = gather_from_sequence_parallel_region(torch.cat((key, value), dim=2), group=group)
        all_keys, all_values = gathered.split((key.shape[2], value.shape[2]), dim=2)
        positions = zigzag_positions(query.shape[0] * group.size(), group.size(), device=query.device)
        mask = positions[group.rank()][:, None] >= positions.flatten()[None, :]
        return all_keys, all_values, mask


def zigzag_positions(seq_length: int, cp_size: int, *, device: torch.device) -> Tensor:
    """Positions that each context-parallel rank holds, in its order: [cp_size, seq_length / cp_size].

    Source: Megatron-Core utils.py, `get_batch_on_this_cp_rank`.
    """
    chunks = torch.arange(seq_length, device=device).chunk(2 * cp_size)
    return torch.stack([torch.cat((chunks[rank], chunks[-1 - rank])) for rank in range(cp_size)])
