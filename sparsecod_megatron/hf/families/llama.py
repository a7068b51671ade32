"""Dense models: Llama; Mistral for windows and head sizes that Llama refuses; Qwen3 for QK-norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen3Config

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.entries import dense_entries

PRE_NORM = frozenset({"layernorm_scaling", "rope_scaling"})
"""Keys that every class of pre-norm layers has a place for."""


def _dense_obstacle(model: ModelConfig) -> str | None:
    return f"model.num_moe_experts={model.num_moe_experts}" if model.is_moe else None


def _llama_obstacle(model: ModelConfig) -> str | None:
    if model.hidden_size % model.num_attention_heads:
        return (
            f"model.hidden_size={model.hidden_size} not a multiple of num_attention_heads={model.num_attention_heads}"
        )
    return _dense_obstacle(model)


def _qwen3_obstacle(model: ModelConfig) -> str | None:
    return _dense_obstacle(model) if model.qk_norm else "model.qk_norm=false"


def _llama_fields(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def _mistral_fields(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window}


def _read_window(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": fields.get("sliding_window")}


def _qwen3_fields(model: ModelConfig) -> dict[str, Any]:
    skip = model.window_attn_skip_freq
    windowed = [
        model.sliding_window is not None and not (skip and (layer + 1) % skip == 0) for layer in range(model.num_layers)
    ]
    return {
        "attention_bias": False,
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in windowed],
    }


def _read_qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    full = [layer for layer, kind in enumerate(fields["layer_types"]) if kind == "full_attention"]
    if len(full) == len(fields["layer_types"]):
        return {"qk_norm": True}
    # The first layer without a window tells the period; whether all others follow is seen by writing it again.
    skip = full[0] + 1 if full else None
    return {"qk_norm": True, "sliding_window": fields["sliding_window"], "window_attn_skip_freq": skip}


LLAMA = Family(
    "LlamaForCausalLM", LlamaConfig, PRE_NORM, _llama_obstacle, dense_entries, _llama_fields, lambda fields: {}
)
MISTRAL = Family(
    "MistralForCausalLM",
    MistralConfig,
    PRE_NORM | {"sliding_window"},
    _dense_obstacle,
    dense_entries,
    _mistral_fields,
    _read_window,
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    Qwen3Config,
    PRE_NORM | {"qk_norm", "sliding_window", "window_attn_skip_freq"},
    _qwen3_obstacle,
    dense_entries,
    _qwen3_fields,
    _read_qwen3,
)
