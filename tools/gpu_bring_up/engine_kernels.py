"""Transformer Engine's kernels, called as Megatron-Core 0.16 calls them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import transformer_engine.pytorch as engine
from torch import Tensor
from transformer_engine.common import recipe as recipes
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.optimizers import FusedAdam, multi_tensor_applier, multi_tensor_l2norm

_BF16 = torch.bfloat16
_RECIPES = {
    "delayed": lambda: recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID),
    "tensorwise": lambda: recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID),
    "blockwise": lambda: recipes.Float8BlockScaling(fp8_format=recipes.Format.E4M3),
}


def rms_norm(hidden: int, *, eps: float, device: str) -> torch.nn.Module:
    """Root-mean-square norm over the last axis."""
    return engine.RMSNorm(hidden, eps=eps, dtype=_BF16, device=device)


def linear(inputs: int, outputs: int, *, device: str, fuse_weight_gradient: bool = False) -> torch.nn.Module:
    """Without bias; with `fuse_weight_gradient`, its weight's gradient is added to `weight.main_grad`."""
    options: dict[str, Any] = {"params_dtype": _BF16, "device": device}
    return engine.Linear(inputs, outputs, bias=False, fuse_wgrad_accumulation=fuse_weight_gradient, **options)


def norm_linear(inputs: int, outputs: int, *, eps: float, device: str) -> torch.nn.Module:
    """RMSNorm and product in one module."""
    options: dict[str, Any] = {"params_dtype": _BF16, "device": device}
    return engine.LayerNormLinear(inputs, outputs, eps=eps, bias=False, normalization="RMSNorm", **options)


def grouped_linear(groups: int, inputs: int, outputs: int, *, device: str) -> torch.nn.Module:
    """Called with tokens and the number of them in each group."""
    return engine.GroupedLinear(groups, inputs, outputs, bias=False, params_dtype=_BF16, device=device)


def attention(heads: int, head: int, *, groups: int, left: int | None) -> torch.nn.Module:
    """Causal, [S, B, heads, head] to [S, B, heads · head]."""
    window = None if left is None else (left, 0)
    options: dict[str, Any] = {"attn_mask_type": "causal", "qkv_format": "sbhd", "layer_number": 1}
    return engine.DotProductAttention(heads, head, num_gqa_groups=groups, window_size=window, **options)


def rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate [S, B, heads, head] by angles [S, 1, 1, head]."""
    return apply_rotary_pos_emb(x, angles, tensor_format="sbhd", fused=True)


def adam(parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """AdamW."""
    return FusedAdam(parameters, **options)


def l2norm(tensors: list[Tensor]) -> Tensor:
    """Norm of all tensors together."""
    overflow = torch.zeros(1, dtype=torch.int, device=tensors[0].device)
    norm, _ = multi_tensor_applier(multi_tensor_l2norm, overflow, [tensors], False)
    return norm


def in_fp8(recipe: str) -> AbstractContextManager[Any]:
    """Products of the block are in FP8."""
    return engine.fp8_autocast(enabled=True, fp8_recipe=_RECIPES[recipe]())
