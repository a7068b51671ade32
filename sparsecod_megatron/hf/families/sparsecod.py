"""Whatever no stock class expresses: the architecture of our own, `modeling_sparsecod.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.configuration_sparsecod import SparsecodConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.entries import LayerTensors, dense_entries, routed_entries, shared_entries
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import same

KEYS_IN_COMMON = (
    "activation",
    "normalization",
    "norm_placement",
    "mix_post_fraction",
    "layernorm_scaling",
    "layernorm_zero_centered_gamma",
    "final_norm",
    "qk_norm",
    "qk_norm_scope",
    "softmax_type",
    "activation_func_clamp_value",
    "rotary_base_local",
    "no_rope_freq",
    "softmax_scale",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "attention_output_gate",
    "qkv_bias",
    "attention_output_bias",
    "mlp_bias",
    "sliding_window",
    "window_attn_skip_freq",
    "num_moe_experts",
    "moe_router_topk",
    "moe_router_topk_per_layer",
    "moe_first_k_dense_layers",
    "moe_shared_expert_intermediate_size",
    "moe_shared_expert_gate",
    "moe_router_score_function",
    "moe_router_pre_softmax",
    "moe_router_topk_scaling_factor",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_dtype",
    "moe_router_enable_expert_bias",
)
"""Keys with one name in `model:` and in the architecture's configuration."""
CODE = tuple(
    Path(__file__).parents[1] / f"{name}_sparsecod.py"
    for name in ("configuration", "modeling", "attention", "moe", "norms", "rotary", "tokens")
)
"""What loading without this package needs beside the weights."""
AUTO_MAP = {
    "AutoConfig": "configuration_sparsecod.SparsecodConfig",
    "AutoModel": "modeling_sparsecod.SparsecodModel",
    "AutoModelForCausalLM": "modeling_sparsecod.SparsecodForCausalLM",
}


def _mlp_entries(tensors: LayerTensors) -> Iterator[Entry]:
    if not tensors.model.is_moe_layer(tensors.layer):
        yield from dense_entries(tensors)
        return
    yield from routed_entries(tensors)
    if tensors.model.moe_router_enable_expert_bias:
        names = (f"{tensors.ours}.mlp.router.expert_bias",), (f"{tensors.theirs}.mlp.gate.expert_bias",)
        yield Entry(*names, same(tensors.rows["router"].shape[:1]))  # a buffer, one for each expert
    yield from shared_entries(tensors)


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {name: getattr(model, name) for name in KEYS_IN_COMMON} | {
        "embedding_norm": model.has_embedding_norm,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "auto_map": AUTO_MAP,
    }


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: fields[name] for name in (*KEYS_IN_COMMON, "embedding_norm", "moe_ffn_hidden_size")}


SPARSECOD = Family(
    "SparsecodForCausalLM",
    SparsecodConfig,
    frozenset((*KEYS_IN_COMMON, "rope_scaling", "rotary_percent", "embedding_norm")),
    lambda model: None,
    _mlp_entries,
    _fields,
    _read,
    folds_scaling=False,
    code=CODE,
    extensible=True,
)
