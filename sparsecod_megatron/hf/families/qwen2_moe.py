"""Mixtures of experts with a shared expert, or with chosen weights that are not renormalised.

Qwen2-MoE has three features that ours has not; each is set so that it computes exactly nothing:

- The shared expert is multiplied by `sigmoid(w · x)`. `w = 0` makes that 0.5 everywhere, and doubling the down
  projection takes it back: both are exact in binary floating point.
- A shared expert is always there. Ours without one gets a narrow one of zeros.
- q, k and v have biases: zeros. `qkv_bias` could switch them off, but readers of the format that do not know it would
  leave the absent biases uninitialised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import Qwen2MoeConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family, gated_mlp_entries, layer_names
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import same, zeros

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EMPTY_SHARED_WIDTH = 16
"""Width of the zero shared expert: narrow beside a real one, yet divisible by the sizes inference engines split by."""


def _obstacle(model: ModelConfig) -> str | None:
    return None if model.is_moe else "model.num_moe_experts unset"


def _layer_entries(model: ModelConfig, layer: int) -> Iterator[Entry]:
    yield _zero_biases(model, layer)
    ours, theirs = (f"{prefix}.mlp" for prefix in layer_names(layer))
    experts, hidden = model.num_moe_experts or 0, model.hidden_size
    yield Entry((f"{ours}.router.weight",), (f"{theirs}.gate.weight",), same((experts, hidden)))
    for expert in range(experts):
        yield from gated_mlp_entries(
            f"{ours}.experts.local_experts.{expert}",
            f"{theirs}.experts.{expert}",
            ffn=model.expert_ffn_hidden_size,
            hidden=hidden,
            hf_names=PROJECTIONS,
        )
    yield from _shared_entries(model, ours, theirs)


def _zero_biases(model: ModelConfig, layer: int) -> Entry:
    attention = f"{layer_names(layer)[1]}.self_attn"
    sizes = [heads * model.head_dim for heads in (model.num_attention_heads, model.query_groups, model.query_groups)]
    return Entry((), tuple(f"{attention}.{part}_proj.bias" for part in "qkv"), zeros(*((size,) for size in sizes)))


def _shared_entries(model: ModelConfig, ours: str, theirs: str) -> Iterator[Entry]:
    hidden, width = model.hidden_size, model.moe_shared_expert_intermediate_size
    shared = f"{theirs}.shared_expert"
    yield Entry((), (f"{theirs}.shared_expert_gate.weight",), zeros((1, hidden)))
    if width is not None:
        yield from gated_mlp_entries(
            f"{ours}.shared_experts", shared, ffn=width, hidden=hidden, hf_names=PROJECTIONS, down_factor=2.0
        )
        return
    inward, outward = (EMPTY_SHARED_WIDTH, hidden), (hidden, EMPTY_SHARED_WIDTH)
    yield Entry((), tuple(f"{shared}.{name}.weight" for name in PROJECTIONS), zeros(inward, inward, outward))


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "moe_intermediate_size": model.expert_ffn_hidden_size,
        "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size or EMPTY_SHARED_WIDTH,
        "router_aux_loss_coef": model.moe_aux_loss_coeff,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "qkv_bias": True,
        "use_sliding_window": False,
    }


QWEN2_MOE = Family("Qwen2MoeForCausalLM", Qwen2MoeConfig, _obstacle, _layer_entries, _fields)
