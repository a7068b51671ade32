"""Fused operations that Megatron-Core takes from CUDA extensions, as eager CPU functions with hand-written gradients.

They keep a CPU run on a par with a plain PyTorch loop. Each equals the unfused formula; `kernels.py` puts most of them
in place.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import mlp

from sparsecod_megatron.backend.redirection import Redirection


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up, with both gradients written into one tensor (no concatenation)."""

    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor) -> torch.Tensor:
        """[..., 2F] → [..., F]."""
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        """[..., F] → [..., 2F]."""
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.mul(torch.ops.aten.silu_backward(grad, gate), up, out=grad_gate)
        return grad_gate_up


class RotaryEmbedding(torch.autograd.Function):
    """x · cos + rotate_half(x) · sin; its gradient is the rotation by the opposite angle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [S, B, heads, D]; cos, sin [S, 1, 1, R/2]."""
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Gradient of x [S, B, heads, D]."""
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight; torch's own is many operations each way, `pow` one of them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """[..., H] and [H] → [..., H]."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """[..., H] → gradients of x and weight."""
        x, weight, inverse = ctx.saved_tensors
        normed, weighted = x * inverse, grad * weight
        along = (weighted * normed).mean(dim=-1, keepdim=True)
        grad_weight = (grad * normed).flatten(0, -2).sum(dim=0)
        return weighted.addcmul_(normed, along, value=-1).mul_(inverse), grad_weight, None


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    rotated, target, width = x, output, 2 * cos.shape[-1]
    if width < x.shape[-1]:  # asked, because empty slices are not free: half a percent of a small model's step
        output[..., width:] = x[..., width:]
        rotated, target = x[..., :width], output[..., :width]
    first, second = rotated.chunk(2, dim=-1)
    output_first, output_second = target.chunk(2, dim=-1)
    torch.mul(first, cos, out=output_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=output_second).addcmul_(first, sin)
    return output


def apply_rotary(t: torch.Tensor, freqs: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotary embedding of the first R channels of each head.

    Args:
        t: queries or keys [S, B, heads, D].
        freqs: angles [S, 1, 1, R], both halves equal.
        interleaved: must be False, the layout of Llama.

    Returns:
        Like `t`.

    Source: Megatron-Core models/common/embeddings/rope_utils.py, `_apply_rotary_pos_emb_bshd`.
    """
    assert not interleaved and freqs.shape[-1] <= t.shape[-1]
    half = freqs[..., : freqs.shape[-1] // 2]
    return RotaryEmbedding.apply(t, half.cos().to(t.dtype), half.sin().to(t.dtype))


def swiglu(
    gate_up: torch.Tensor, bias: torch.Tensor | None, fp8_input_store: bool = False, offload: bool = False
) -> torch.Tensor:
    """silu(gate) · up of [..., 2F], plus a bias first if there is one."""
    return SwiGLU.apply(gate_up if bias is None else gate_up + bias)


def weighted_swiglu(
    gate_up: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, fp8_input_store: bool = False
) -> torch.Tensor:
    """swiglu times the router's probability of each token, [tokens, 2F] and [tokens, 1] → [tokens, F]."""
    return (swiglu(gate_up, bias) * weights).to(gate_up.dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `functional.rms_norm`; of our own in fp32."""
    if x.dtype != torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return RMSNorm.apply(x, weight, eps)


def accumulate_weight_gradient(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad [out, in] += grad_outputᵀ · input, for [tokens, in] and [tokens, out]."""
    if grad_output.dtype == main_grad.dtype:
        main_grad.addmm_(grad_output.t(), total_input)
    else:
        main_grad.add_(grad_output.t() @ total_input)


def redirections() -> list[Redirection]:
    """Redirections of fused operations."""
    wgrad = SimpleNamespace(
        wgrad_gemm_accum_fp32=accumulate_weight_gradient, wgrad_gemm_accum_fp16=accumulate_weight_gradient
    )
    place, extension = "tensor_parallel/layers.py", "a CUDA extension"
    return [
        Redirection(
            mlp,
            "weighted_bias_swiglu_impl",
            weighted_swiglu,
            "transformer/mlp.py:175",
            "several operations each way",
            speed_only=True,
        ),
        Redirection(layers, "_grad_accum_fusion_available", True, f"{place}:924", extension),
        Redirection(layers, "fused_weight_gradient_mlp_cuda", wgrad, f"{place}:569", extension, absent=True),
    ]
