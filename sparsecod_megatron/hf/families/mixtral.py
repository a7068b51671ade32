"""Mixtures of experts without a shared expert whose chosen weights sum to one.

Mixtral takes the softmax over all experts, keeps the top k and renormalises; Megatron without `moe_router_pre_softmax`
takes the top k logits and then the softmax. Both are `exp(z_e) / Σ_{chosen} exp(z)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import MixtralConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import PRE_NORM, experts_obstacle, shared_expert_obstacle
from sparsecod_megatron.hf.families.entries import LayerTensors, routed_entries
from sparsecod_megatron.hf.table import Entry


def _obstacle(model: ModelConfig) -> str | None:
    pre_softmax = "model.moe_router_pre_softmax=true" if model.moe_router_pre_softmax else None
    return experts_obstacle(model) or shared_expert_obstacle(model) or pre_softmax


def _mlp_entries(tensors: LayerTensors) -> Iterator[Entry]:
    return routed_entries(tensors, place="block_sparse_moe", hf_names=("w1", "w3", "w2"))


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": model.expert_ffn_hidden_size,
        "num_local_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "sliding_window": model.sliding_window,
    }


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "num_moe_experts": fields["num_local_experts"],
        "moe_router_topk": fields["num_experts_per_tok"],
        "moe_ffn_hidden_size": fields["intermediate_size"],
        "moe_aux_loss_coeff": fields["router_aux_loss_coef"],
        "sliding_window": fields.get("sliding_window"),
    }


MIXTRAL = Family(
    "MixtralForCausalLM", MixtralConfig, PRE_NORM | {"sliding_window"}, _obstacle, _mlp_entries, _fields, _read
)
