"""From the precision section to Megatron-Core's three configuration classes, which all hold a part of it."""

from __future__ import annotations

from typing import Any

import torch

from sparsecod_megatron.config import PrecisionConfig


def torch_dtype(precision: PrecisionConfig) -> torch.dtype:
    """Number format of the model's parameters and activations; the optimizer's own are fp32."""
    return torch.bfloat16 if precision.dtype == "bf16" else torch.float32


def precision_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of TransformerConfig.

    Attention, router, norms, embeddings and output layer stay in `dtype`. Experts pad their tokens to FP8's multiple
    themselves; `moe_router_padding_for_quantization` would route more tokens instead, and the router's statistics
    would count them.
    """
    dtype = torch_dtype(precision)
    fields: dict[str, Any] = {"bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    if not precision.fp8:
        return fields
    first, last = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    return {
        **fields,
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.fp8_recipe,
        "fp8_amax_history_len": precision.fp8_amax_history_len,
        "fp8_amax_compute_algo": precision.fp8_amax_compute_algo,
        "fp8_param": precision.fp8_param_gather,
        "first_last_layers_bf16": first + last > 0,
        # Megatron's own defaults are one layer each.
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
    }


def optimizer_precision_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron's OptimizerConfig; the recipe says how its fp32 weights are written into FP8 ones."""
    dtype = torch_dtype(precision)
    recipe = precision.fp8_recipe if precision.fp8 else None
    return {"bf16": dtype == torch.bfloat16, "params_dtype": dtype, "fp8_recipe": recipe}


def ddp_precision_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of DistributedDataParallelConfig."""
    return {"fp8_param_gather": precision.fp8_param_gather}
