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
from sparsecod_megatron.hf.families.common import (
    PRE_NORM,
    experts_obstacle,
    local_experts_fields,
    other_value,
    read_local_experts,
    read_window,
    shared_expert_obstacle,
    window_fields,
)
from sparsecod_megatron.hf.families.entries import LayerTensors, routed_entries
from sparsecod_megatron.hf.table import Entry


def _obstacle(model: ModelConfig) -> str | None:
    sums_to_one = other_value(model, moe_router_pre_softmax=False)
    return experts_obstacle(model) or shared_expert_obstacle(model) or sums_to_one


def _mlp_entries(tensors: LayerTensors) -> Iterator[Entry]:
    return routed_entries(tensors, place="block_sparse_moe", hf_names=("w1", "w3", "w2"))


def _fields(model: ModelConfig) -> dict[str, Any]:
    return local_experts_fields(model) | window_fields(model)


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return read_local_experts(fields) | read_window(fields)


MIXTRAL = Family(
    "MixtralForCausalLM", MixtralConfig, PRE_NORM | {"sliding_window"}, _obstacle, _mlp_entries, _fields, _read
)
