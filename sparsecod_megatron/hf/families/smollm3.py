"""SmolLM3: Llama with layers whose queries and keys do not rotate.

The class says so by `no_rope_layers`, 1 where a layer rotates; `no_rope_layer_interval` only fills that list in.

Source: transformers, models/smollm3/modeling_smollm3.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import SmolLM3Config

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    PRE_NORM,
    bias_fields,
    dense_obstacle,
    layer_types,
    one_attention_bias,
    read_biases,
    read_layer_types,
)
from sparsecod_megatron.hf.families.entries import dense_entries


def _obstacle(model: ModelConfig) -> str | None:
    return dense_obstacle(model) or one_attention_bias(model)


def _fields(model: ModelConfig) -> dict[str, Any]:
    unrotated = model.no_rope_freq or [0] * model.num_layers
    return layer_types(model) | bias_fields(model) | {"no_rope_layers": [1 - here for here in unrotated]}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    unrotated = [int(not rotates) for rotates in fields["no_rope_layers"]]
    rotation = {"no_rope_freq": unrotated if any(unrotated) else None}
    return rotation | read_biases(fields) | read_layer_types(fields)


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    SmolLM3Config,
    PRE_NORM | ATTENTION_BIASES | {"mlp_bias", "no_rope_freq", "sliding_window", "window_attn_skip_freq"},
    _obstacle,
    dense_entries,
    _fields,
    _read,
)
