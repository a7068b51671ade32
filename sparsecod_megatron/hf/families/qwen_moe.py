"""Mixtures of experts with a shared expert or without renormalised weights (Qwen2-MoE), or with QK-norm (Qwen3-MoE).

Qwen2-MoE has three features that ours may lack; each is then set so that it computes exactly nothing:

- The shared expert is multiplied by `sigmoid(w · x)`. `w = 0` makes that 0.5 everywhere, and doubling the down
  projection takes it back: both are exact in binary floating point.
- A shared expert is always there. Ours without one gets a narrow one of zeros.
- q, k and v have biases: zeros where ours have none. The class's `qkv_bias` could switch them off, but readers of the
  format that do not know it would leave the absent biases uninitialised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    PRE_NORM,
    experts_obstacle,
    one_attention_bias,
    read_attention_bias,
    read_routed,
    routed_fields,
    shared_expert_obstacle,
)
from sparsecod_megatron.hf.families.entries import (
    PROJECTIONS,
    LayerTensors,
    dense_entries,
    routed_entries,
    shared_entries,
)
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import zeros

ZERO_EXPERT_WIDTH = 16
"""Width of the zero shared expert: narrow beside a real one, yet divisible by the sizes inference engines split by."""


def _qwen3_obstacle(model: ModelConfig) -> str | None:
    norm = None if model.qk_norm else "model.qk_norm=false"
    return experts_obstacle(model) or norm or shared_expert_obstacle(model) or one_attention_bias(model)


def _qwen2_entries(tensors: LayerTensors) -> Iterator[Entry]:
    if not tensors.model.qkv_bias:
        yield _zero_biases(tensors)
    yield from _qwen3_entries(tensors)
    if "router" in tensors.rows:
        yield from _shared_entries(tensors)


def _qwen3_entries(tensors: LayerTensors) -> Iterator[Entry]:
    return routed_entries(tensors) if "router" in tensors.rows else dense_entries(tensors)


def _zero_biases(tensors: LayerTensors) -> Entry:
    shapes = tensors.query_key_value("qkv_bias").hf_shapes
    return Entry((), tuple(_bias_names(tensors.layer)), zeros(*shapes))


def _bias_names(layer: int) -> list[str]:
    return [f"model.layers.{layer}.self_attn.{part}_proj.bias" for part in "qkv"]


def _shared_entries(tensors: LayerTensors) -> Iterator[Entry]:
    """A shared expert and its gate, of zeros where ours has none."""
    shared, hidden = f"{tensors.theirs}.mlp.shared_expert", tensors.model.hidden_size
    has_gate = "shared_expert_gate" in tensors.rows
    if not has_gate:
        yield Entry((), (f"{shared}_gate.weight",), zeros((1, hidden)))
    yield from shared_entries(tensors, down_factor=1.0 if has_gate else 2.0)
    if "shared_expert_input" not in tensors.rows:
        inward, outward = (ZERO_EXPERT_WIDTH, hidden), (hidden, ZERO_EXPERT_WIDTH)
        yield Entry((), tuple(f"{shared}.{name}.weight" for name in PROJECTIONS), zeros(inward, inward, outward))


def _layered_fields(model: ModelConfig) -> dict[str, Any]:
    return routed_fields(model) | {
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(model.moe_first_k_dense_layers)),
    }


def _read_layered(fields: Mapping[str, Any]) -> dict[str, Any]:
    dense = sorted(fields.get("mlp_only_layers") or [])
    if dense != list(range(len(dense))) or fields["decoder_sparse_step"] != 1:
        raise ConversionError(
            f"config.json: mlp_only_layers {dense} with decoder_sparse_step {fields['decoder_sparse_step']} has no "
            "counterpart; only layers from the first on can be dense"
        )
    return read_routed(fields) | {"moe_first_k_dense_layers": len(dense)}


def _qwen2_fields(model: ModelConfig) -> dict[str, Any]:
    return _layered_fields(model) | {
        "shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size or ZERO_EXPERT_WIDTH,
        "qkv_bias": True,
        "use_sliding_window": False,
    }


def _read_qwen2(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _read_layered(fields) | {
        "qkv_bias": True,
        "moe_shared_expert_intermediate_size": fields["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }


def _without_placeholders(model: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelConfig:
    """Without biases that are all zero, a gate that is 0.5 everywhere, and a shared expert that stays at zero."""
    biases = [name for layer in range(model.num_layers) for name in _bias_names(layer)]
    if all(name in tensors and not bool(tensors[name].any()) for name in biases):
        model = replace(model, qkv_bias=False)
    mixtures = [f"model.layers.{layer}.mlp" for layer in range(model.num_layers) if model.is_moe_layer(layer)]

    def is_zero(part: str) -> bool:
        names = [f"{mixture}.{part}.weight" for mixture in mixtures]
        return all(name in tensors and not bool(tensors[name].any()) for name in names)

    if not is_zero("shared_expert_gate"):
        return model
    is_narrow = model.moe_shared_expert_intermediate_size == ZERO_EXPERT_WIDTH
    if is_narrow and all(is_zero(f"shared_expert.{name}") for name in PROJECTIONS):
        model = replace(model, moe_shared_expert_intermediate_size=None)
    return replace(model, moe_shared_expert_gate=False)


def _qwen3_fields(model: ModelConfig) -> dict[str, Any]:
    window = {"use_sliding_window": model.sliding_window is not None, "sliding_window": model.sliding_window}
    return _layered_fields(model) | window | {"attention_bias": model.qkv_bias}


def _read_qwen3(fields: Mapping[str, Any]) -> dict[str, Any]:
    window = {"sliding_window": fields.get("sliding_window")}
    return _read_layered(fields) | window | read_attention_bias(fields) | {"qk_norm": True}


QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    Qwen2MoeConfig,
    PRE_NORM | {"qkv_bias", "moe_shared_expert_gate", "moe_first_k_dense_layers"},
    experts_obstacle,
    _qwen2_entries,
    _qwen2_fields,
    _read_qwen2,
    without_placeholders=_without_placeholders,
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    Qwen3MoeConfig,
    PRE_NORM | ATTENTION_BIASES | {"qk_norm", "sliding_window", "moe_first_k_dense_layers"},
    _qwen3_obstacle,
    _qwen3_entries,
    _qwen3_fields,
    _read_qwen3,
)
