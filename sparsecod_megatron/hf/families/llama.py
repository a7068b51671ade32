"""Dense models: Llama; Mistral for windows and head sizes that Llama refuses; Qwen2 for biases; Qwen3 for QK-norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    PRE_NORM,
    bias_fields,
    dense_obstacle,
    indivisible_heads,
    layer_types,
    one_attention_bias,
    read_attention_bias,
    read_biases,
    read_layer_types,
    read_window,
    window_fields,
)
from sparsecod_megatron.hf.families.entries import dense_entries


def _llama_obstacle(model: ModelConfig) -> str | None:
    return indivisible_heads(model) or dense_obstacle(model) or one_attention_bias(model)


def _qwen2_obstacle(model: ModelConfig) -> str | None:
    return dense_obstacle(model) if model.qkv_bias else "model.qkv_bias=false"


def _qwen3_obstacle(model: ModelConfig) -> str | None:
    if not model.qk_norm:
        return "model.qk_norm=false"
    return dense_obstacle(model) or one_attention_bias(model)


def _qwen2_fields(model: ModelConfig) -> dict[str, Any]:
    return layer_types(model) | {"max_window_layers": 0}


def _read_qwen2(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"qkv_bias": True} | read_layer_types(fields)


def _qwen3_fields(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias} | _qwen2_fields(model)


def _read_qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"qk_norm": True} | read_attention_bias(fields) | read_layer_types(fields)


LLAMA = Family(
    "LlamaForCausalLM",
    LlamaConfig,
    PRE_NORM | ATTENTION_BIASES | {"mlp_bias"},
    _llama_obstacle,
    dense_entries,
    bias_fields,
    read_biases,
)
MISTRAL = Family(
    "MistralForCausalLM",
    MistralConfig,
    PRE_NORM | {"sliding_window"},
    dense_obstacle,
    dense_entries,
    window_fields,
    read_window,
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
