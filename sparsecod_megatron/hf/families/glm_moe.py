"""Mixtures of experts with a sigmoid router that a bias balances, as Ling 2.0 and GLM-4.5 have them (Glm4Moe).

Its router takes the best groups by the sum of their two best experts, selects with the bias and weighs without it,
divides by the sum of the chosen and multiplies by a factor: Megatron's `sigmoid` router with an expert bias, where a
group is judged by two experts and more than one is chosen.

Source: transformers, models/glm4_moe/modeling_glm4_moe.py; Ling 2.0 (arXiv 2510.22115).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import Glm4MoeConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import PRE_NORM, experts_obstacle
from sparsecod_megatron.hf.families.entries import LayerTensors, dense_entries, routed_entries, shared_entries
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import same

JUDGES = 2
"""Experts by which the class judges a group."""


def _obstacle(model: ModelConfig) -> str | None:
    if obstacle := experts_obstacle(model):
        return obstacle
    shared, width = model.moe_shared_expert_intermediate_size, model.expert_ffn_hidden_size
    if shared is None or shared % width:
        return f"model.moe_shared_expert_intermediate_size={shared}, not a multiple of an expert's {width}"
    if model.moe_router_score_function != "sigmoid":
        return f"model.moe_router_score_function={model.moe_router_score_function}"
    if not model.moe_router_enable_expert_bias:
        return "model.moe_router_enable_expert_bias=false"
    if model.moe_router_topk == 1:  # the class would divide the one weight by itself
        return "model.moe_router_topk=1"
    groups = model.moe_router_group_topk
    if model.moe_router_num_groups is not None and model.moe_router_topk != JUDGES * (groups or 0):
        return f"model.moe_router_topk={model.moe_router_topk}, not {JUDGES} x model.moe_router_group_topk"
    return None


def _mlp_entries(tensors: LayerTensors) -> Iterator[Entry]:
    if not tensors.model.is_moe_layer(tensors.layer):
        yield from dense_entries(tensors)
        return
    yield from routed_entries(tensors)
    names = (f"{tensors.ours}.mlp.router.expert_bias",), (f"{tensors.theirs}.mlp.gate.e_score_correction_bias",)
    yield Entry(*names, same(tensors.rows["router"].shape[:1]))
    yield from shared_entries(tensors, name="shared_experts")


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": model.qkv_bias,
        "use_qk_norm": model.qk_norm,
        "partial_rotary_factor": model.rotary_percent,  # the class's default is a half
        "moe_intermediate_size": model.expert_ffn_hidden_size,
        "num_experts_per_tok": model.moe_router_topk,
        "n_routed_experts": model.num_moe_experts,
        "n_shared_experts": (model.moe_shared_expert_intermediate_size or 0) // model.expert_ffn_hidden_size,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_topk or 1,
        "first_k_dense_replace": model.moe_first_k_dense_layers,
        "norm_topk_prob": True,
        "num_mtp_layers": 0,
    }


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    if not fields["n_shared_experts"]:
        raise ConversionError("config.json: n_shared_experts 0 has no counterpart; the class has at least one")
    has_groups = fields["n_group"] > 1
    return {
        "qkv_bias": fields["attention_bias"],
        "qk_norm": fields["use_qk_norm"],
        "moe_ffn_hidden_size": fields["moe_intermediate_size"],
        "moe_router_topk": fields["num_experts_per_tok"],
        "num_moe_experts": fields["n_routed_experts"],
        "moe_shared_expert_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "moe_router_topk_scaling_factor": fields["routed_scaling_factor"],
        "moe_router_num_groups": fields["n_group"] if has_groups else None,
        "moe_router_group_topk": fields["topk_group"] if has_groups else None,
        "moe_first_k_dense_layers": fields["first_k_dense_replace"],
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_aux_loss_coeff": 0.0,
    }


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    Glm4MoeConfig,
    PRE_NORM
    | {
        "qkv_bias",
        "qk_norm",
        "rotary_percent",
        "moe_first_k_dense_layers",
        "moe_router_score_function",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_enable_expert_bias",
    },
    _obstacle,
    _mlp_entries,
    _fields,
    _read,
)
