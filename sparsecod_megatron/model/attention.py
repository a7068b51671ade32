"""Causal core attention through torch's scaled_dot_product_attention, for layer specs without Transformer Engine.

Megatron's DotProductAttention materialises every head's scores and refuses context parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint
from torch import Tensor

from sparsecod_megatron.model.sinks import with_sinks, without_sinks


class SDPAttention(torch.nn.Module):
    """softmax(q·kᵀ/√d + mask)·v with grouped queries; the mask is causal, and a window in the layers that have one.

    With `softmax_type` learnable each head has a sink, `softmax_offset` as in Transformer Engine.

    Args:
        config: dropout probability; `window_size` (left, 0) and `window_attn_skip_freq`, as in Transformer Engine.
        layer_number: 1-based, as Megatron numbers layers.
        attn_mask_type: must be causal.
        attention_type: `self`; unused.
        attention_dropout: overrides the configuration's.
        softmax_scale: overrides 1/√d.
        cp_comm_type: kind of context-parallel exchange in Transformer Engine; unused.
        pg_collection: the run's groups; `cp` is used by a subclass.
        k_channels: of a head's keys, which latent attention names; the tensors have them.
        v_channels: of a head's values, likewise.
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
        k_channels: int | None = None,
        v_channels: int | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, "decoder-only models attend causally"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale
        self.pg_collection = pg_collection
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed and config.window_size else None
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [S, B, heads/TP, D], key and value [S, B, groups/TP, D] → [S, B, heads/TP · D].

        Values may have other channels than keys, and the result then has theirs.
        """
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        channels = value.shape[-1]
        key, value, mask = self.visible(query, key, value)
        scale, is_causal = self.softmax_scale, mask is None
        if self.softmax_offset is not None:
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            query, key, value, mask = with_sinks(query, key, value, mask, self.softmax_offset, scale=scale)
        if mask is not None and mask.dim() == 3:
            mask = mask.unsqueeze(0)  # torch's fused kernels take two axes or four
        q, k, v = (x.permute(1, 2, 0, 3) for x in _of_one_width(query, key, value))
        context = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        context = context.permute(2, 0, 1, 3)
        if self.softmax_offset is not None:
            context = without_sinks(context, is_causal=is_causal)
        return context[..., :channels].flatten(start_dim=2)

    def visible(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values [S_key, B, groups/TP, D] that these queries see; mask [(heads/TP,) S, S_key] or None."""
        length = query.shape[0]
        if self.window is None or self.window >= length:
            return key, value, None
        positions = torch.arange(length, device=query.device)
        return key, value, self.allowed(positions, positions)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The sinks, cut as the heads are."""
        if self.softmax_offset is None:
            return {}
        assert self.pg_collection is not None
        groups = {"tp_group": self.pg_collection.tp, "dp_cp_group": metadata["dp_cp_group"]}
        own, axes = {"softmax_offset": self.softmax_offset}, {"softmax_offset": 0}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(own, prefix, axes, sharded_offsets, **groups)
        return state

    def allowed(self, query_positions: Tensor, key_positions: Tensor) -> Tensor:
        """Whether each query [S] sees each key [S_key]: not after it, and inside the window. [S, S_key], bool."""
        distance = query_positions[:, None] - key_positions[None, :]
        return (distance >= 0) if self.window is None else (distance >= 0) & (distance < self.window)


class ContextParallelSDPAttention(SDPAttention):
    """The same over a sequence sharded by context parallelism: keys and values are gathered, queries stay.

    Rank r of n holds chunks r and 2n−1−r of 2n, which balances the causal work. The gather's gradient is a
    reduce-scatter.
    """

    def visible(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gathers [S/CP, B, groups/TP, D] to [S, B, groups/TP, D]; the mask compares positions. Collective (`cp`)."""
        assert self.pg_collection is not None
        group = self.pg_collection.cp
        gathered = gather_from_sequence_parallel_region(torch.cat((key, value), dim=3), group=group)
        all_keys, all_values = gathered.split((key.shape[3], value.shape[3]), dim=3)
        positions = zigzag_positions(query.shape[0] * group.size(), group.size(), device=query.device)
        return all_keys, all_values, self.allowed(positions[group.rank()], positions.flatten())


class DocumentSDPAttention(SDPAttention):
    """The same within each document of a packed sequence (Megatron's `thd` format), one call per document."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query [T, heads/TP, D], key and value [T, groups/TP, D] → [T, heads/TP · D]; unpacked batches as above."""
        if packed_seq_params is None:
            return super().forward(query, key, value, attention_mask, attn_mask_type, attention_bias)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        documents = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([super(DocumentSDPAttention, self).forward(q, k, v, None) for q, k, v in documents]).squeeze(1)


def _of_one_width(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
    """With zeros behind the narrower ones' channels, which change no score and come off the result again.

    torch's flash attention takes one width alone, and its other function keeps every score. The scale is given.
    """
    width = max(query.shape[-1], value.shape[-1])
    return tuple(x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))


def zigzag_positions(seq_length: int, cp_size: int, *, device: torch.device) -> Tensor:
    """Positions that each context-parallel rank holds, in its order: [cp_size, seq_length / cp_size].

    Source: Megatron-Core utils.py, `get_batch_on_this_cp_rank`.
    """
    chunks = torch.arange(seq_length, device=device).chunk(2 * cp_size)
    return torch.stack([torch.cat((chunks[rank], chunks[-1 - rank])) for rank in range(cp_size)])
