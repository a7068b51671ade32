"""Granite: Llama with constant factors on embeddings, scores, branches and logits.

Source: transformers, models/granite/modeling_granite.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GraniteConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    PRE_NORM,
    bias_fields,
    dense_obstacle,
    one_attention_bias,
    read_biases,
)
from sparsecod_megatron.hf.families.entries import dense_entries

FACTORS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
"""Fields of the class that are keys of ours by the same names."""


def _obstacle(model: ModelConfig) -> str | None:
    return dense_obstacle(model) or one_attention_bias(model)


def _fields(model: ModelConfig) -> dict[str, Any]:
    factors = {name: getattr(model, name) for name in FACTORS}
    return factors | bias_fields(model) | {"attention_multiplier": model.softmax_scale or model.head_dim**-0.5}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    factors = {name: float(fields[name]) for name in FACTORS}
    return factors | read_biases(fields) | {"softmax_scale": float(fields["attention_multiplier"])}


GRANITE = Family(
    "GraniteForCausalLM",
    GraniteConfig,
    PRE_NORM | ATTENTION_BIASES | {"mlp_bias", "softmax_scale", *FACTORS},
    _obstacle,
    dense_entries,
    _fields,
    _read,
)
