"""Dense models: Llama; Mistral for windows and head sizes that Llama refuses; Qwen2 for biases; Qwen3 for QK-norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.entries import dense_entries

PRE_NORM = frozenset({"layernorm_scaling", "rope_scaling"})
"""Keys that every class of pre-norm layers has a place for."""


def dense_obstacle(model: ModelConfig) -> str | None:
    """The obstacle of classes without experts."""
    return f"model.num_moe_experts={model.num_moe_experts}" if model.is_moe else None


def _llama_obstacle(model: ModelConfig) -> str | None:
    if model.hidden_size % model.num_attention_heads:
        return (
            f"model.hidden_size={model.hidden_size} not a multiple of num_attention_heads={model.num_attention_heads}"
        )
    return dense_obstacle(model) or one_attention_bias(model)


def one_attention_bias(model: ModelConfig) -> str | None:
    """The obstacle of classes whose `attention_bias` is of all four projections."""
    if model.qkv_bias == model.attention_output_bias:
        return None
    return f"model.qkv_bias={str(model.qkv_bias).lower()} with another attention_output_bias"


def _qwen2_obstacle(model: ModelConfig) -> str | None:
    return dense_obstacle(model) if model.qkv_bias else "model.qkv_bias=false"


def _qwen3_obstacle(model: ModelConfig) -> str | None:
    if not model.qk_norm:
        return "model.qk_norm=false"
    return dense_obstacle(model) or one_attention_bias(model)


def _llama_fields(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}


def _read_llama(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_attention_bias(fields) | {"mlp_bias": fields["mlp_bias"]}


def read_attention_bias(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of one `attention_bias` of all four projections."""
    return {"qkv_bias": fields["attention_bias"], "attention_output_bias": fields["attention_bias"]}


def _mistral_fields(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window}


def _read_window(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"sliding_window": fields.get("sliding_window")}


def layer_types(model: ModelConfig) -> dict[str, Any]:
    """Windows as classes have them that name the kind of every layer."""
    skip = model.window_attn_skip_freq
    windowed = [
        model.sliding_window is not None and not (skip and (layer + 1) % skip == 0) for layer in range(model.num_layers)
    ]
    return {
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in windowed],
    }


def _qwen2_fields(model: ModelConfig) -> dict[str, Any]:
    return layer_types(model) | {"max_window_layers": 0}


def read_layer_types(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of a window, and of layers by kind."""
    full = [layer for layer, kind in enumerate(fields["layer_types"]) if kind == "full_attention"]
    if len(full) == len(fields["layer_types"]):
        return {}
    # The first layer without a window tells the period; whether all others follow is seen by writing it again.
    skip = full[0] + 1 if full else None
    return {"sliding_window": fields["sliding_window"], "window_attn_skip_freq": skip}


def _read_qwen2(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True} | read_layer_types(fields)


def _qwen3_fields(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias} | _qwen2_fields(model)


def _read_qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True} | read_attention_bias(fields) | read_layer_types(fields)


ATTENTION_BIASES = frozenset({"qkv_bias", "attention_output_bias"})
"""Keys of one `attention_bias`."""
LLAMA = Family(
    "LlamaForCausalLM",
    LlamaConfig,
    PRE_NORM | ATTENTION_BIASES | {"mlp_bias"},
    _llama_obstacle,
    dense_entries,
    _llama_fields,
    _read_llama,
)
MISTRAL = Family(
    "MistralForCausalLM",
    MistralConfig,
    PRE_NORM | {"sliding_window"},
    dense_obstacle,
    dense_entries,
    _mistral_fields,
    _read_window,
)
QWEN2 = Family(
    "Qwen2ForCausalLM",
    Qwen2Config,
    PRE_NORM | {"qkv_bias", "sliding_window", "window_attn_skip_freq"},
    _qwen2_obstacle,
    dense_entries,
    _qwen2_fields,
    _read_qwen2,
)
QWEN3 = Family(
    "Qwen3ForCausalLM",
    Qwen3Config,
    PRE_NORM | ATTENTION_BIASES | {"qk_norm", "sliding_window", "window_attn_skip_freq"},
    _qwen3_obstacle,
    dense_entries,
    _qwen3_fields,
    _read_qwen3,
)
