"""GPT-OSS: experts with biases and a clamped activation behind a router with one, attention with sinks.

The files hold the experts of a layer in one tensor, transposed, gate and up rows taking turns. The published weights
are mxfp4, which is refused: nothing here multiplies it.

Source: OpenAI, gpt-oss (arXiv 2508.10925); transformers, models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GptOssConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    PRE_NORM,
    experts_obstacle,
    local_experts_fields,
    one_attention_bias,
    other_value,
    read_attention_bias,
    read_layer_types,
    read_local_experts,
    shared_expert_obstacle,
    window_obstacle,
    windows_by_layer,
)
from sparsecod_megatron.hf.families.entries import LayerTensors
from sparsecod_megatron.hf.table import Entry
from sparsecod_megatron.hf.transforms import Shape, Transform, same

ALPHA = 1.702
"""Gain of the gate's sigmoid, which Megatron-Core's function has fixed (megatron/core/activations.py)."""


def _obstacle(model: ModelConfig) -> str | None:
    fixed = {"activation": "clamped_swiglu", "mlp_bias": True, "softmax_type": "learnable"}
    return (
        experts_obstacle(model)
        or shared_expert_obstacle(model)
        or other_value(model, **fixed, moe_router_pre_softmax=False)
        or window_obstacle(model)
        or one_attention_bias(model)
    )


def _of_all_experts(shape: Shape, experts: int, *, takes_turns: bool) -> Transform:
    """Tensors of each expert against one of all: matrices transposed, and halves of the rows taking turns."""

    def to_hf(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = torch.stack(tuple(tensors))
        if takes_turns:
            whole = torch.stack(whole.chunk(2, dim=1), dim=2).flatten(1, 2)
        return (whole.transpose(1, -1).contiguous() if len(shape) == 2 else whole,)

    def to_megatron(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        whole = tensors[0].transpose(1, -1) if len(shape) == 2 else tensors[0]
        if takes_turns:
            whole = torch.cat((whole[:, ::2], whole[:, 1::2]), dim=1)
        return [tensor.contiguous() for tensor in whole]

    return Transform((shape,) * experts, ((experts, *reversed(shape)),), to_hf=to_hf, to_megatron=to_megatron)


def _mlp_entries(tensors: LayerTensors) -> Iterator[Entry]:
    rows, ours, theirs = tensors.rows, f"{tensors.ours}.mlp", f"{tensors.theirs}.mlp"
    for kind, end in (("router", "weight"), ("router_bias", "bias")):
        yield Entry((f"{ours}.router.{end}",), (f"{theirs}.router.{end}",), same(rows[kind].shape))
    for part, number, name in (("input", 1, "gate_up_proj"), ("output", 2, "down_proj")):
        for kind, end, suffix in ((f"expert_{part}", "weight", ""), (f"expert_{part}_bias", "bias", "_bias")):
            row = rows[kind]
            own = tuple(f"{ours}.experts.local_experts.{at}.linear_fc{number}.{end}" for at in range(row.copies))
            transform = _of_all_experts(row.shape, row.copies, takes_turns=part == "input")
            yield Entry(own, (f"{theirs}.experts.{name}{suffix}",), transform)


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {
        **windows_by_layer(model),
        **local_experts_fields(model),
        "attention_bias": model.qkv_bias,
        "swiglu_alpha": ALPHA,
        "swiglu_limit": model.activation_func_clamp_value,
    }


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **read_attention_bias(fields),
        **read_layer_types(fields),
        **read_local_experts(fields),
        "activation": "clamped_swiglu",
        "activation_func_clamp_value": float(fields["swiglu_limit"]),
        "mlp_bias": True,
        "softmax_type": "learnable",
    }


GPT_OSS = Family(
    "GptOssForCausalLM",
    GptOssConfig,
    PRE_NORM | ATTENTION_BIASES | {"activation", "mlp_bias", "softmax_type", "sliding_window", "window_attn_skip_freq"},
    _obstacle,
    _mlp_entries,
    _fields,
    _read,
)
