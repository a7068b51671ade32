"""Elementwise formulas through torch.compile: each becomes one loop forward and one backward.

Compiled are parts of a layer, not whole layers: modules, and the hooks that layer statistics place on them, stay as
they are. The first step takes the time to compile; torch keeps the results on disk for the next run.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from megatron.core.parallel_state import get_tensor_model_parallel_world_size
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

logger = logging.getLogger("sparsecod")


def has_compiler() -> bool:
    """Whether there is a C++ compiler for torch.compile; one line of the log says so if there is none."""
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        logger.warning("cpu_kernels: no C++ compiler (g++), so nothing is compiled; runs as with cpu_kernels=fast")
        return False
    return True


@torch.compile
def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@torch.compile
def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


@torch.compile
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps) * weight


@torch.compile
def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), reduction="none").view(target.shape)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `functional.rms_norm`; compiled in fp32."""
    if x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _rms_norm(x, weight, eps)


def swiglu(gate_up: Tensor, bias: Tensor | None, fp8_input_store: bool = False, offload: bool = False) -> Tensor:
    """silu(gate) · up of [..., 2F], plus a bias first if there is one."""
    return _swiglu(gate_up if bias is None else gate_up + bias)


def apply_rotary(t: Tensor, freqs: Tensor, interleaved: bool = False) -> Tensor:
    """As `speed.apply_rotary`."""
    assert not interleaved and freqs.shape[-1] <= t.shape[-1]
    half = freqs[..., : freqs.shape[-1] // 2]
    return _rotate(t, half.cos().to(t.dtype), half.sin().to(t.dtype))


def cross_entropy(vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Nats of each token, [S, B, vocab / TP] and [S, B] → [S, B]; upstream's where the vocabulary is split.

    Source: Megatron-Core tensor_parallel/cross_entropy.py, `vocab_parallel_cross_entropy` (arguments).
    """
    if label_smoothing or get_tensor_model_parallel_world_size() > 1:
        return vocab_parallel_cross_entropy(vocab_parallel_logits, target, label_smoothing)
    return _cross_entropy(vocab_parallel_logits, target)
