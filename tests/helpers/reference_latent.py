"""Multi-latent attention written down from its definition, head by head, on tensors under Megatron-Core's names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparsecod_megatron.config import ModelConfig

EPSILON = 1e-6
"""Of the norms of latents."""


def without_latents(model: ModelConfig) -> ModelConfig:
    """One of ordinary attention whose heads have the channels that rotate, for their angles."""
    return replace(model, multi_latent_attention=False, kv_channels=model.qk_pos_emb_head_dim)


def latent_heads(
    model: ModelConfig, weights: Mapping[str, Tensor], at: str, x: Tensor, rotation: Tensor, hidden_keys: Tensor
) -> Tensor:
    """What all heads bring, `[batch, seq, heads · v_head_dim]`.

    Args:
        model: the variant.
        weights: under the names of a GPTModel of one process.
        at: name of the attention.
        x: its input, `[batch, seq, hidden]`.
        rotation: complex, of modulus one, `[seq, qk_pos_emb_head_dim / 2]`.
        hidden_keys: added to scores, minus infinity where a query does not see a key.
    """
    plain, turning = model.qk_head_dim, model.qk_pos_emb_head_dim
    scale, growth = 1 / math.sqrt(plain + turning), 1.0
    if model.rope_scaling == "yarn":
        longer = 0.1 * math.log(model.rope_scaling_factor)
        ours, everywhere = (1 + longer * a for a in (model.mscale, model.mscale_all_dim))
        scale, growth = scale * everywhere**2, ours / everywhere

    def turned(channels: Tensor) -> Tensor:
        pairs = torch.view_as_complex(channels.unflatten(-1, (-1, 2)).contiguous())
        return growth * torch.view_as_real(pairs * rotation).flatten(-2)

    def latent(part: str, size: int) -> tuple[Tensor, Tensor]:
        down = x @ weights[f"{at}.linear_{part}_down_proj.weight"].T
        small, beside = down[..., :size], down[..., size:]
        root = (small.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        factor = weights[f"{at}.{part}_layernorm.weight"] + model.layernorm_zero_centered_gamma
        return factor * small / root, beside

    source, up = (x, "linear_q_proj") if model.q_lora_rank is None else (None, "linear_q_up_proj")
    if source is None:
        source, _ = latent("q", model.q_lora_rank or 0)
    queries = source @ weights[f"{at}.{up}.weight"].T
    small, shared = latent("kv", model.kv_lora_rank)
    keys_values = small @ weights[f"{at}.linear_kv_up_proj.weight"].T
    key_turned, outputs = turned(shared), []
    for head in range(model.num_attention_heads):
        query = queries[..., head * (plain + turning) :][..., : plain + turning]
        own = keys_values[..., head * (plain + model.v_head_dim) :][..., : plain + model.v_head_dim]
        key, value = own[..., :plain], own[..., plain:]
        scores = query[..., :plain] @ key.transpose(1, 2) + turned(query[..., plain:]) @ key_turned.transpose(1, 2)
        outputs.append((scores * scale + hidden_keys).softmax(-1) @ value)
    return torch.cat(outputs, dim=-1)


def latent_tensors(
    model: ModelConfig, at: str, matrix: Callable[[int, int], Tensor], norm: Callable[[int], Tensor]
) -> dict[str, Tensor]:
    """Random tensors of one layer's attention.

    Args:
        model: the variant.
        at: name of the attention.
        matrix: makes one of these rows and columns.
        norm: makes the weight of a norm.
    """
    heads, hidden, kept = model.num_attention_heads, model.hidden_size, model.kv_lora_rank
    queries = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    tensors = {
        "linear_kv_down_proj": matrix(kept + model.qk_pos_emb_head_dim, hidden),
        "kv_layernorm": norm(kept),
        "linear_kv_up_proj": matrix(heads * (model.qk_head_dim + model.v_head_dim), kept),
        "linear_proj": matrix(hidden, heads * model.v_head_dim),
    }
    if model.q_lora_rank is None:
        tensors["linear_q_proj"] = matrix(queries, hidden)
    else:
        tensors["linear_q_down_proj"] = matrix(model.q_lora_rank, hidden)
        tensors["q_layernorm"] = norm(model.q_lora_rank)
        tensors["linear_q_up_proj"] = matrix(queries, model.q_lora_rank)
    return {f"{at}.{name}.weight": tensor for name, tensor in tensors.items()}
