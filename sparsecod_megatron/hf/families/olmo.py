"""OLMo-2, OLMo-3 and OLMoE: queries and keys normalised over all heads, and in the dense two no norm before a branch.

The norms of those stand behind the branches. OLMo-3 has windows in some layers, whose rotation may have a base of its
own, as YaRN is of the others alone. OLMoE's layers are pre-norm, with experts in each of them and no shared one.

Source: transformers, models/olmo2/modeling_olmo2.py, models/olmo3/modeling_olmo3.py, models/olmoe/modeling_olmoe.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from transformers import Olmo2Config, Olmo3Config, OlmoeConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    BRANCH_NORMS,
    PRE_NORM,
    dense_obstacle,
    experts_obstacle,
    one_attention_bias,
    read_attention_bias,
    read_layer_types,
    read_routed,
    routed_fields,
    shared_expert_obstacle,
    window_obstacle,
    windows_by_layer,
)
from sparsecod_megatron.hf.families.entries import dense_entries, renamed, routed_entries
from sparsecod_megatron.hf.families.rotary import one_rope, rope_by_kind

EXPERT_WIDTH = "intermediate_size"
"""OLMoE's field of an expert's inner width."""
PROJECTION_NORMS = frozenset({"qk_norm", "qk_norm_scope", "rope_scaling"}) | ATTENTION_BIASES
"""Keys that all three have a place for."""


def _norm_obstacle(model: ModelConfig) -> str | None:
    if not model.norms_projections:
        return f"model.qk_norm={str(model.qk_norm).lower()} with qk_norm_scope={model.qk_norm_scope}"
    return one_attention_bias(model)


def _dense_obstacle(model: ModelConfig) -> str | None:
    if model.norm_placement != "branch":
        return f"model.norm_placement={model.norm_placement}"
    return dense_obstacle(model) or _norm_obstacle(model)


def _olmo3_obstacle(model: ModelConfig) -> str | None:
    return window_obstacle(model) or _dense_obstacle(model)


def _olmoe_obstacle(model: ModelConfig) -> str | None:
    if obstacle := experts_obstacle(model) or shared_expert_obstacle(model):
        return obstacle
    if model.num_attention_heads * model.head_dim != model.hidden_size:
        return f"model.kv_channels={model.head_dim}, not hidden_size / num_attention_heads"
    return _norm_obstacle(model)


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": model.qkv_bias}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_attention_bias(fields) | {"qk_norm": True, "qk_norm_scope": "projection"}


def _read_dense(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read(fields) | {"norm_placement": "branch"}


def _olmo3_fields(model: ModelConfig) -> dict[str, Any]:
    return _fields(model) | windows_by_layer(model) | rope_by_kind(model)


def _read_olmo3(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read_dense(fields) | read_layer_types(fields) | {"rotary_base_local": fields["rotary_base_local"]}


def _olmoe_fields(model: ModelConfig) -> dict[str, Any]:
    return _fields(model) | routed_fields(model, width=EXPERT_WIDTH) | {"clip_qkv": None}


def _read_olmoe(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read(fields) | read_routed(fields, width=EXPERT_WIDTH)


OLMO2 = Family(
    "Olmo2ForCausalLM",
    Olmo2Config,
    PROJECTION_NORMS | {"norm_placement"},
    _dense_obstacle,
    dense_entries,
    _fields,
    _read_dense,
    layout=partial(renamed, names=BRANCH_NORMS),
)
OLMO3 = Family(
    "Olmo3ForCausalLM",
    Olmo3Config,
    PROJECTION_NORMS | {"norm_placement", "sliding_window", "window_attn_skip_freq", "rotary_base_local"},
    _olmo3_obstacle,
    dense_entries,
    _olmo3_fields,
    _read_olmo3,
    layout=partial(renamed, names=BRANCH_NORMS),
    flat=one_rope,
)
OLMOE = Family(
    "OlmoeForCausalLM",
    OlmoeConfig,
    PROJECTION_NORMS | PRE_NORM,
    _olmoe_obstacle,
    routed_entries,
    _olmoe_fields,
    _read_olmoe,
)
