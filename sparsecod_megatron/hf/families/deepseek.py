"""Multi-latent attention, as DeepSeek-V3 and V2 have it, with the experts of either or with none.

V3's experts are those of `glm_moe.py`. V2's router takes the softmax over all and does not renormalise the chosen; it
judges a group by its best expert, which ours does where a token takes fewer than two experts from each group. The
classes turn neighbouring channels, as Megatron-Core's latent attention does, so that rows keep their order.

Source: transformers, models/deepseek_v3/modeling_deepseek_v3.py and models/deepseek_v2/modeling_deepseek_v2.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import DeepseekV2Config, DeepseekV3Config

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import PRE_NORM
from sparsecod_megatron.hf.families.entries import LayerTensors, dense_entries, routed_entries, shared_entries
from sparsecod_megatron.hf.families.glm_moe import (
    BALANCED_KEYS,
    balanced_entries,
    balanced_obstacle,
    counted_fields,
    judges_obstacle,
    read_balanced,
    read_counted,
    shared_width_obstacle,
)
from sparsecod_megatron.hf.families.rotary import rope_parameters
from sparsecod_megatron.hf.table import Entry

_WIDTHS = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
"""Key of ours → field."""
_V2_JUDGES = 1
"""Experts by which V2 judges a group."""
_SCALES = ("mscale", "mscale_all_dim")
_OF_EXPERTS = (
    "moe_intermediate_size",
    "num_experts_per_tok",
    "n_routed_experts",
    "n_shared_experts",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "norm_topk_prob",
    "topk_method",
)
"""Fields that a model without experts does not read."""


def _latent_obstacle(model: ModelConfig) -> str | None:
    if not model.multi_latent_attention:
        return "model.multi_latent_attention=false"
    ours, everywhere = model.mscale, model.mscale_all_dim
    if model.rope_scaling == "yarn" and not (ours and everywhere) and (ours, everywhere) != (1.0, 0.0):
        return f"model.mscale={ours:g} with model.mscale_all_dim={everywhere:g}"  # it reads both or neither
    return None


def _v3_obstacle(model: ModelConfig) -> str | None:
    return _latent_obstacle(model) or (balanced_obstacle(model) if model.is_moe else None)


def _v2_obstacle(model: ModelConfig) -> str | None:
    if (obstacle := _latent_obstacle(model)) or not model.is_moe:
        return obstacle
    if obstacle := shared_width_obstacle(model):
        return obstacle
    if not model.moe_router_pre_softmax:
        return "model.moe_router_pre_softmax=false"
    return judges_obstacle(model, _V2_JUDGES)


def _v2_entries(tensors: LayerTensors) -> Iterator[Entry]:
    if not tensors.model.is_moe_layer(tensors.layer):
        yield from dense_entries(tensors)
        return
    yield from routed_entries(tensors)
    yield from shared_entries(tensors, name="shared_experts")


def _shared_fields(model: ModelConfig) -> dict[str, Any]:
    """Attention, and that no layer has experts where none has."""
    scales = {name: getattr(model, name) for name in _SCALES}
    scaled = model.rope_scaling == "yarn" and model.mscale_all_dim
    return {
        **{field: getattr(model, key) for key, field in _WIDTHS.items()},
        "rope_parameters": rope_parameters(model) | (scales if scaled else {}),
        "attention_bias": False,
        "first_k_dense_replace": model.num_layers,
    } | (counted_fields(model) if model.is_moe else {})


def _read_latents(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of attention."""
    rope = fields["rope_parameters"]
    has_scales = rope["rope_type"] == "yarn" and all(rope.get(name) for name in _SCALES)
    return {
        "multi_latent_attention": True,
        "kv_channels": None,
        **{key: fields[field] for key, field in _WIDTHS.items()},
        **({name: float(rope[name]) for name in _SCALES} if has_scales else {}),
    }


def _v3_fields(model: ModelConfig) -> dict[str, Any]:
    return _shared_fields(model) | {"num_mtp_layers": 0, "norm_topk_prob": True, "rope_interleave": True}


def _read_v3(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read_latents(fields) | (read_balanced(fields) if _has_experts(fields) else {})


def _v2_fields(model: ModelConfig) -> dict[str, Any]:
    by_groups = model.is_moe and model.moe_router_num_groups is not None
    return _shared_fields(model) | {
        "mlp_bias": False,
        "norm_topk_prob": False,  # transformers' class does not read it; DeepSeek's own would renormalise
        "topk_method": "group_limited_greedy" if by_groups else "greedy",
    }


def _read_v2(fields: Mapping[str, Any]) -> dict[str, Any]:
    if not _has_experts(fields):
        return _read_latents(fields)
    return _read_latents(fields) | read_counted(fields, _V2_JUDGES) | {"moe_router_pre_softmax": True}


def _has_experts(fields: Mapping[str, Any]) -> bool:
    """Whether some layer does, of fields as `_flat` leaves them."""
    return fields["n_routed_experts"] is not None


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without the fields of experts, and of groups of them, that a model does not read."""
    flat, layers = dict(fields), fields["num_hidden_layers"]
    if flat["first_k_dense_replace"] >= layers:
        return flat | dict.fromkeys(_OF_EXPERTS) | {"first_k_dense_replace": layers}
    if "topk_method" in flat and (flat["topk_method"] == "greedy" or flat["n_group"] == 1):
        flat |= {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    return flat


DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    DeepseekV3Config,
    PRE_NORM | BALANCED_KEYS | {"multi_latent_attention"},
    _v3_obstacle,
    balanced_entries,
    _v3_fields,
    _read_v3,
    spelling={"head_dim": None},
    flat=_flat,
)
DEEPSEEK_V2 = Family(
    "DeepseekV2ForCausalLM",
    DeepseekV2Config,
    PRE_NORM
    | {
        "multi_latent_attention",
        "moe_first_k_dense_layers",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
    },
    _v2_obstacle,
    _v2_entries,
    _v2_fields,
    _read_v2,
    spelling={"head_dim": None},
    flat=_flat,
)
