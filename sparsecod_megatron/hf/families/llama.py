"""Dense models: Llama, and Mistral for head sizes that Llama's configuration refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import LlamaConfig, MistralConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family, gated_mlp_entries, layer_names
from sparsecod_megatron.hf.table import Entry


def _dense_obstacle(model: ModelConfig) -> str | None:
    return f"model.num_moe_experts={model.num_moe_experts}" if model.is_moe else None


def _llama_obstacle(model: ModelConfig) -> str | None:
    if model.hidden_size % model.num_attention_heads:
        return f"model.hidden_size={model.hidden_size} no multiple of num_attention_heads={model.num_attention_heads}"
    return _dense_obstacle(model)


def _mlp_entries(model: ModelConfig, layer: int) -> Iterator[Entry]:
    ours, theirs = layer_names(layer)
    return gated_mlp_entries(
        f"{ours}.mlp",
        f"{theirs}.mlp",
        ffn=model.ffn_hidden_size,
        hidden=model.hidden_size,
        hf_names=("gate_proj", "up_proj", "down_proj"),
    )


def _llama_fields(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def _mistral_fields(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": None}


LLAMA = Family("LlamaForCausalLM", LlamaConfig, _llama_obstacle, _mlp_entries, _llama_fields)
MISTRAL = Family("MistralForCausalLM", MistralConfig, _dense_obstacle, _mlp_entries, _mistral_fields)
