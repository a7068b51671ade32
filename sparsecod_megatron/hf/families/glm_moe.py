"""Mixtures of experts with a sigmoid router that a bias balances, as Ling 2.0 and GLM-4.5 have them (Glm4Moe).

DeepSeek-V3 has the same experts (`deepseek.py`).

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
BALANCED: dict[str, Any] = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
"""Our keys of its router."""
BALANCED_KEYS = frozenset(
    {
        *BALANCED,
        "moe_first_k_dense_layers",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
    }
)
"""Keys that classes with these experts have a place for."""


def _obstacle(model: ModelConfig) -> str | None:
    return experts_obstacle(model) or balanced_obstacle(model)


def shared_width_obstacle(model: ModelConfig) -> str | None:
    """The obstacle of classes that count shared experts of the width of a routed one."""
    shared, width = model.moe_shared_expert_intermediate_size, model.expert_ffn_hidden_size
    if shared is None or shared % width:
        return f"model.moe_shared_expert_intermediate_size={shared}, not a multiple of an expert's {width}"
    return None


def balanced_obstacle(model: ModelConfig) -> str | None:
    """The obstacle of classes with these experts, of a model that has some."""
    if obstacle := shared_width_obstacle(model):
        return obstacle
    if model.moe_router_score_function != "sigmoid":
        return f"model.moe_router_score_function={model.moe_router_score_function}"
    if not model.moe_router_enable_expert_bias:
        return "model.moe_router_enable_expert_bias=false"
    if model.moe_router_topk == 1:  # the class would divide the one weight by itself
        return "model.moe_router_topk=1"
    return judges_obstacle(model, JUDGES)


def judges_obstacle(model: ModelConfig, judges: int) -> str | None:
    """The obstacle of classes that judge a group by so many of its experts: ours by as many as fit into the choice."""
    chosen = model.moe_router_group_topk
    if model.moe_router_num_groups is None or chosen is None or model.moe_router_topk // chosen == judges:
        return None
    return f"model.moe_router_topk={model.moe_router_topk} over model.moe_router_group_topk={chosen} is not {judges}"


def balanced_entries(tensors: LayerTensors) -> Iterator[Entry]:
    """A dense MLP, or these experts with their shared ones and the bias."""
    if not tensors.model.is_moe_layer(tensors.layer):
        yield from dense_entries(tensors)
        return
    yield from routed_entries(tensors)
    names = (f"{tensors.ours}.mlp.router.expert_bias",), (f"{tensors.theirs}.mlp.gate.e_score_correction_bias",)
    yield Entry(*names, same(tensors.rows["router"].shape[:1]))
    yield from shared_entries(tensors, name="shared_experts")


def _fields(model: ModelConfig) -> dict[str, Any]:
    return counted_fields(model) | {
        "attention_bias": model.qkv_bias,
        "use_qk_norm": model.qk_norm,
        "partial_rotary_factor": model.rotary_percent,  # the class's default is a half
        "norm_topk_prob": True,
        "num_mtp_layers": 0,
    }


def counted_fields(model: ModelConfig) -> dict[str, Any]:
    """Experts and their groups as these classes count them."""
    return {
        "moe_intermediate_size": model.expert_ffn_hidden_size,
        "num_experts_per_tok": model.moe_router_topk,
        "n_routed_experts": model.num_moe_experts,
        "n_shared_experts": (model.moe_shared_expert_intermediate_size or 0) // model.expert_ffn_hidden_size,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        "n_group": model.moe_router_num_groups or 1,
        "topk_group": model.moe_router_group_topk or 1,
        "first_k_dense_replace": model.moe_first_k_dense_layers,
    }


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_balanced(fields) | {"qkv_bias": fields["attention_bias"], "qk_norm": fields["use_qk_norm"]}


def read_balanced(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of these experts and their router.

    Raises:
        ConversionError: a token uses one expert, or as `read_counted`.
    """
    if fields["num_experts_per_tok"] == 1:
        raise ConversionError(
            "config.json: num_experts_per_tok 1: the class divides the one weight by itself, our models keep it; "
            "import a model with more"
        )
    return read_counted(fields, JUDGES) | BALANCED


def read_counted(fields: Mapping[str, Any], judges: int) -> dict[str, Any]:
    """Our keys of what `counted_fields` wrote; the loss of training is not among them.

    Args:
        fields: of the configuration.
        judges: experts by which the class judges a group.

    Raises:
        ConversionError: there is no shared expert, or ours would judge groups by another number of experts.
    """
    if not fields["n_shared_experts"]:
        raise ConversionError("config.json: n_shared_experts 0 has no counterpart; the class has at least one")
    has_groups = (fields["n_group"] or 1) > 1
    if has_groups and (ours := fields["num_experts_per_tok"] // fields["topk_group"]) != judges:
        raise ConversionError(
            f"config.json: topk_group {fields['topk_group']}: the class judges a group by {judges} "
            f"expert{'s' if judges > 1 else ''}, our models by num_experts_per_tok / topk_group, which is {ours}; "
            "import a model without groups"
        )
    return {
        "moe_ffn_hidden_size": fields["moe_intermediate_size"],
        "moe_router_topk": fields["num_experts_per_tok"],
        "num_moe_experts": fields["n_routed_experts"],
        "moe_shared_expert_intermediate_size": fields["n_shared_experts"] * fields["moe_intermediate_size"],
        "moe_router_topk_scaling_factor": fields["routed_scaling_factor"],
        "moe_router_num_groups": fields["n_group"] if has_groups else None,
        "moe_router_group_topk": fields["topk_group"] if has_groups else None,
        "moe_first_k_dense_layers": fields["first_k_dense_replace"],
        "moe_aux_loss_coeff": 0.0,
    }


GLM4_MOE = Family(
    "Glm4MoeForCausalLM",
    Glm4MoeConfig,
    PRE_NORM | BALANCED_KEYS | {"qkv_bias", "qk_norm", "rotary_percent"},
    _obstacle,
    balanced_entries,
    _fields,
    _read,
)
