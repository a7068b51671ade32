"""Gemma: zero-centred weights of norms, embeddings times √width, GELU's tanh form; norms around branches from 2 on.

Gemma-3 also normalises queries and keys, and its layers within the window rotate by a base of their own. Gemma-2 caps
scores and logits by tanh unless its two fields are null; no fused attention does, so a model with caps is refused.

Source: transformers, models/gemma/modeling_gemma.py, and the same of gemma2 and gemma3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    SANDWICH_NORMS,
    dense_obstacle,
    indivisible_heads,
    one_attention_bias,
    other_value,
    read_attention_bias,
    read_layer_types,
    window_obstacle,
    windows_by_layer,
)
from sparsecod_megatron.hf.families.entries import dense_entries, renamed
from sparsecod_megatron.hf.families.rotary import one_rope, rope_by_kind

ACTIVATION = "gelu_pytorch_tanh"
"""What the classes call `geglu_tanh`."""
FEATURES = ATTENTION_BIASES | {"activation", "layernorm_zero_centered_gamma", "embedding_multiplier", "rope_scaling"}
"""Keys that all three have a place for."""
AROUND = frozenset({"norm_placement", "softmax_scale", "sliding_window", "window_attn_skip_freq"})
"""Keys that Gemma-2 and Gemma-3 have a place for."""


def _scalar(model: ModelConfig) -> int:
    """`query_pre_attn_scalar`, whose inverse root is the scale of the scores."""
    return model.head_dim if model.softmax_scale is None else round(model.softmax_scale**-2)


def _obstacle(model: ModelConfig) -> str | None:
    fixed = {"layernorm_zero_centered_gamma": True, "activation": "geglu_tanh"}
    return (
        other_value(model, **fixed, embedding_multiplier=model.hidden_size**0.5)
        or dense_obstacle(model)
        or indivisible_heads(model)
        or one_attention_bias(model)
    )


def _gemma2_obstacle(model: ModelConfig) -> str | None:
    if obstacle := other_value(model, norm_placement="sandwich"):
        return obstacle
    if model.softmax_scale not in (None, _scalar(model) ** -0.5):
        return f"model.softmax_scale={model.softmax_scale}, not the inverse root of a whole number"
    return window_obstacle(model) or _obstacle(model)


def _gemma3_obstacle(model: ModelConfig) -> str | None:
    return other_value(model, qk_norm=True) or _gemma2_obstacle(model)


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias, "hidden_act": ACTIVATION}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_attention_bias(fields) | {
        "activation": "geglu_tanh",
        "layernorm_zero_centered_gamma": True,
        "embedding_multiplier": fields["hidden_size"] ** 0.5,
    }


def _gemma2_fields(model: ModelConfig) -> dict[str, Any]:
    # `hidden_act` stays, for readers of other classes who would take it for another.
    own = {"hidden_activation": ACTIVATION, "query_pre_attn_scalar": _scalar(model)}
    return (
        _fields(model)
        | windows_by_layer(model)
        | own
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    )


def _read_gemma2(fields: Mapping[str, Any]) -> dict[str, Any]:
    scalar = fields["query_pre_attn_scalar"]
    scale = {"softmax_scale": None if scalar == fields["head_dim"] else scalar**-0.5}
    return _read(fields) | read_layer_types(fields) | scale | {"norm_placement": "sandwich"}


def _gemma3_fields(model: ModelConfig) -> dict[str, Any]:
    return _gemma2_fields(model) | rope_by_kind(model)


def _read_gemma3(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read_gemma2(fields) | {"qk_norm": True, "rotary_base_local": fields["rotary_base_local"]}


GEMMA = Family("GemmaForCausalLM", GemmaConfig, FEATURES, _obstacle, dense_entries, _fields, _read)
GEMMA2 = Family(
    "Gemma2ForCausalLM",
    Gemma2Config,
    FEATURES | AROUND,
    _gemma2_obstacle,
    dense_entries,
    _gemma2_fields,
    _read_gemma2,
    layout=partial(renamed, names=SANDWICH_NORMS),
)
GEMMA3 = Family(
    "Gemma3ForCausalLM",
    Gemma3TextConfig,
    FEATURES | AROUND | {"qk_norm", "rotary_base_local"},
    _gemma3_obstacle,
    dense_entries,
    _gemma3_fields,
    _read_gemma3,
    layout=partial(renamed, names=SANDWICH_NORMS),
    flat=one_rope,
)
