"""Mixtures of experts without a shared expert whose chosen weights sum to one.

Mixtral takes the softmax over all experts, keeps the top k and renormalises; Megatron without `moe_router_pre_softmax`
takes the top k logits and then the softmax. Both are `exp(z_e) / Σ_{chosen} exp(z)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import MixtralConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family, gated_mlp_entries, layer_names
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import same


def _obstacle(model: ModelConfig) -> str | None:
    if not model.is_moe:
        return "model.num_moe_experts unset"
    if model.moe_shared_expert_intermediate_size is not None:
        return f"model.moe_shared_expert_intermediate_size={model.moe_shared_expert_intermediate_size}"
    if model.moe_router_pre_softmax:
        return "model.moe_router_pre_softmax=true"
    return None


def _expert_entries(model: ModelConfig, layer: int) -> Iterator[Entry]:
    our_layer, their_layer = layer_names(layer)
    ours, theirs = f"{our_layer}.mlp", f"{their_layer}.block_sparse_moe"
    experts, hidden = model.num_moe_experts or 0, model.hidden_size
    yield Entry((f"{ours}.router.weight",), (f"{theirs}.gate.weight",), same((experts, hidden)))
    for expert in range(experts):
        yield from gated_mlp_entries(
            f"{ours}.experts.local_experts.{expert}",
            f"{theirs}.experts.{expert}",
            ffn=model.expert_ffn_hidden_size,
            hidden=hidden,
            hf_names=("w1", "w3", "w2"),
        )


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size": model.expert_ffn_hidden_size,
        "num_local_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "sliding_window": None,
    }


MIXTRAL = Family("MixtralForCausalLM", MixtralConfig, _obstacle, _expert_entries, _fields)
