"""What several classes share: keys that they have a place for, obstacles, biases, windows by layer, experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsecod_megatron.config import ModelConfig

PRE_NORM = frozenset({"layernorm_scaling", "rope_scaling"})
"""Keys that every class of pre-norm layers has a place for."""
ATTENTION_BIASES = frozenset({"qkv_bias", "attention_output_bias"})
"""Keys of one `attention_bias`."""
BRANCH_NORMS = {"attention_join_norm": "post_attention_layernorm", "mlp_join_norm": "post_feedforward_layernorm"}
"""Norms behind branches, in our class → in classes that have them."""
SANDWICH_NORMS = BRANCH_NORMS | {"post_attention_layernorm": "pre_feedforward_layernorm"}
"""The same of classes that have norms before branches too."""


def dense_obstacle(model: ModelConfig) -> str | None:
    """The obstacle of classes without experts."""
    return f"model.num_moe_experts={model.num_moe_experts}" if model.is_moe else None


def stated(model: ModelConfig, key: str) -> str:
    """A key with its value, as an obstacle names it."""
    value = getattr(model, key)
    return f"model.{key}={str(value).lower() if isinstance(value, bool) else value}"


def other_value(model: ModelConfig, **wanted: object) -> str | None:
    """The obstacle of classes that have one value of each of these keys; the first that is another."""
    return next((stated(model, key) for key, value in wanted.items() if getattr(model, key) != value), None)


def window_obstacle(model: ModelConfig) -> str | None:
    """The obstacle of classes some of whose layers have a window."""
    return "model.sliding_window=null" if model.sliding_window is None else None


def indivisible_heads(model: ModelConfig) -> str | None:
    """The obstacle of classes that refuse heads which do not divide the width."""
    heads = model.num_attention_heads
    return (
        f"model.hidden_size={model.hidden_size} not a multiple of num_attention_heads={heads}"
        if (model.hidden_size % heads)
        else None
    )


def one_attention_bias(model: ModelConfig) -> str | None:
    """The obstacle of classes whose `attention_bias` is of all four projections."""
    if model.qkv_bias == model.attention_output_bias:
        return None
    return f"model.qkv_bias={str(model.qkv_bias).lower()} with another attention_output_bias"


def experts_obstacle(model: ModelConfig) -> str | None:
    """The obstacle of classes of experts."""
    return None if model.is_moe else "model.num_moe_experts unset"


def shared_expert_obstacle(model: ModelConfig) -> str | None:
    """The obstacle of classes whose experts are all routed."""
    width = model.moe_shared_expert_intermediate_size
    return None if width is None else f"model.moe_shared_expert_intermediate_size={width}"


def bias_fields(model: ModelConfig) -> dict[str, Any]:
    """Biases as Llama has them: of all four projections of attention, and of the MLP."""
    return {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}


def read_biases(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of what `bias_fields` wrote."""
    return read_attention_bias(fields) | {"mlp_bias": fields["mlp_bias"]}


def read_attention_bias(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of one `attention_bias` of all four projections."""
    return {"qkv_bias": fields["attention_bias"], "attention_output_bias": fields["attention_bias"]}


def window_fields(model: ModelConfig) -> dict[str, Any]:
    """A window of all layers."""
    return {"sliding_window": model.sliding_window}


def read_window(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our key of it."""
    return {"sliding_window": fields.get("sliding_window")}


def layer_types(model: ModelConfig) -> dict[str, Any]:
    """Windows as classes have them that name the kind of every layer, and can do without."""
    return {"use_sliding_window": model.sliding_window is not None, **windows_by_layer(model)}


def windows_by_layer(model: ModelConfig) -> dict[str, Any]:
    """The same of classes that always have a window."""
    skip = model.window_attn_skip_freq
    windowed = [
        model.sliding_window is not None and not (skip and (layer + 1) % skip == 0) for layer in range(model.num_layers)
    ]
    return {
        "sliding_window": model.sliding_window,
        "layer_types": ["sliding_attention" if here else "full_attention" for here in windowed],
    }


def read_layer_types(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of a window, and of layers by kind."""
    full = [layer for layer, kind in enumerate(fields["layer_types"]) if kind == "full_attention"]
    if len(full) == len(fields["layer_types"]):
        return {}
    # The first layer without a window tells the period; whether all others follow is seen by writing it again.
    skip = full[0] + 1 if full else None
    return {"sliding_window": fields["sliding_window"], "window_attn_skip_freq": skip}


def routed_fields(model: ModelConfig, *, width: str = "moe_intermediate_size") -> dict[str, Any]:
    """Experts and their router as most classes have them.

    Args:
        model: ours.
        width: what the class calls an expert's inner width.
    """
    return {
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        width: model.expert_ffn_hidden_size,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
    }


def read_routed(fields: Mapping[str, Any], *, width: str = "moe_intermediate_size") -> dict[str, Any]:
    """Our keys of what `routed_fields` wrote."""
    return {
        "num_moe_experts": fields.get("num_experts", fields.get("num_local_experts")),
        "moe_router_topk": fields["num_experts_per_tok"],
        "moe_router_pre_softmax": not fields["norm_topk_prob"],
        "moe_ffn_hidden_size": fields[width],
        "moe_aux_loss_coeff": fields["router_aux_loss_coef"],
    }


def local_experts_fields(model: ModelConfig) -> dict[str, Any]:
    """Experts as classes have them whose every layer has some, and whose weights sum to one."""
    return {
        "intermediate_size": model.expert_ffn_hidden_size,
        "num_local_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
    }


def read_local_experts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Our keys of what `local_experts_fields` wrote."""
    return {
        "num_moe_experts": fields["num_local_experts"],
        "moe_router_topk": fields["num_experts_per_tok"],
        "moe_ffn_hidden_size": fields["intermediate_size"],
        "moe_aux_loss_coeff": fields["router_aux_loss_coef"],
    }
