"""Rotary embeddings that GPTModel cannot make by itself: Llama 3's from any length, and a second base by kind of layer.

Both kinds of angles go through the decoder as one tensor, which full recompute keeps as it keeps any; each layer's
attention takes its own of it.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.flops import is_windowed
from sparsecod_megatron.model.layer import VariedAttention

LOCAL: dict[str, Any] = {"yarn_rotary_scaling_factor": 1.0}
"""By it Megatron-Core's attention scales cosines and sines; YaRN is not of the layers within the window."""


class RotationByKind(torch.nn.Module):
    """Angles of the layers that see everything, above those of the layers within the window.

    Args:
        everywhere: what GPTModel made.
        local: of the layers within the window.
    """

    def __init__(self, everywhere: RotaryEmbedding, local: RotaryEmbedding) -> None:
        super().__init__()
        self.everywhere, self.local = everywhere, local

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """[2, S_local, 1, 1, D] from the arguments of each; a pair with YaRN's factor where the first gives one."""
        angles, local = self.everywhere(*args, **kwargs), self.local(*args, **kwargs)
        if isinstance(angles, tuple):
            return torch.stack((angles[0], local)), angles[1]
        return torch.stack((angles, local))

    def get_rotary_seq_len(self, *args: Any) -> int:
        """Positions of the sequence."""
        return int(self.everywhere.get_rotary_seq_len(*args))


class KindRotatedAttention(VariedAttention):
    """Megatron's attention, which takes the angles of its layer's kind.

    Args:
        *arguments: of `VariedAttention`.
        is_local: whether it is within the window.
        **options: of `VariedAttention`.
    """

    def __init__(self, *arguments: Any, is_local: bool, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.kind = int(is_local)

    def forward(self, *args: Any, rotary_pos_emb: Tensor | None = None, **kwargs: Any) -> Any:
        """The parent's, with [S_local, 1, 1, D] of [2, S_local, 1, 1, D]."""
        own = None if rotary_pos_emb is None else rotary_pos_emb[self.kind]
        return super().forward(*args, rotary_pos_emb=own, **kwargs)


def rotate_by_kind(chunk: GPTModel, model: ModelConfig) -> None:
    """Give a model chunk the second rotation, of layers within the window, where ours has a base for it. Local."""
    if model.rotary_base_local is None:
        return
    config = chunk.config
    local = RotaryEmbedding(
        kv_channels=model.head_dim,
        rotary_percent=model.rotary_percent,
        rotary_interleaved=config.rotary_interleaved,
        rotary_base=model.rotary_base_local,
        use_cpu_initialization=config.use_cpu_initialization,
        cp_group=chunk.pg_collection.cp,
    )
    chunk.rotary_pos_emb = RotationByKind(chunk.rotary_pos_emb, local)


def changes_by_kind(model: ModelConfig, layer: int) -> dict[str, Any]:
    """Fields of Megatron-Core's configuration that attention of layer `layer` (from 0) has otherwise."""
    return LOCAL if model.rope_scaling == "yarn" and is_windowed(model, layer) else {}


def scale_as_llama3(embedding: RotaryEmbedding, model: ModelConfig) -> None:
    """Give a rotary embedding Llama 3's frequencies; GPTModel's argument for it knows 8,192 positions alone. Local.

    Source: Megatron-Core models/common/embeddings/rotary_pos_embedding.py, `_apply_scaling`.
    """
    original = model.rope_original_max_position_embeddings
    embedding.inv_freq = embedding._apply_scaling(
        embedding.inv_freq, factor=model.rope_scaling_factor, original_max_position_embeddings=original
    )
