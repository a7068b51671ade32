"""What stands in for `engine_kernels.py` in a rehearsal: the same signatures, in plain PyTorch on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BF16 = torch.bfloat16
_ROUNDS: ContextVar[bool] = ContextVar("rounds", default=False)
"""Whether a block of `in_fp8` runs."""


def rms_norm(hidden: int, *, eps: float, device: str) -> torch.nn.Module:
    """Root-mean-square norm over the last axis."""
    return torch.nn.RMSNorm(hidden, eps=eps, dtype=_BF16, device=device)


class _Linear(torch.nn.Linear):
    """Rounds its operands to e4m3 in a block of `in_fp8`; adds its gradient to `main_grad` when asked."""

    def __init__(self, inputs: int, outputs: int, *, device: str, fuse_weight_gradient: bool = False) -> None:
        super().__init__(inputs, outputs, bias=False, device=device, dtype=_BF16)
        if fuse_weight_gradient:
            self.weight.register_post_accumulate_grad_hook(_add_to_main)

    def forward(self, x: Tensor) -> Tensor:
        """Product with the weight."""
        return F.linear(_rounded(x), _rounded(self.weight))


def _add_to_main(weight: Any) -> None:
    weight.main_grad += weight.grad
    weight.grad = None


def _rounded(tensor: Tensor) -> Tensor:
    """In e4m3 with one scale, whose gradient is that of the tensor itself."""
    if not _ROUNDS.get():
        return tensor
    scale = tensor.detach().abs().amax().float() / 448
    rounded = ((tensor.detach() / scale).to(torch.float8_e4m3fn).float() * scale).to(tensor.dtype)
    return tensor + (rounded - tensor).detach()


def linear(inputs: int, outputs: int, *, device: str, fuse_weight_gradient: bool = False) -> torch.nn.Module:
    """Without bias; with `fuse_weight_gradient`, its weight's gradient is added to `weight.main_grad`."""
    return _Linear(inputs, outputs, device=device, fuse_weight_gradient=fuse_weight_gradient)


class _NormLinear(_Linear):
    def __init__(self, inputs: int, outputs: int, *, eps: float, device: str) -> None:
        super().__init__(inputs, outputs, device=device)
        self.eps = eps
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(inputs, dtype=_BF16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        """Norm and product."""
        return super().forward(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


def norm_linear(inputs: int, outputs: int, *, eps: float, device: str) -> torch.nn.Module:
    """RMSNorm and product in one module."""
    return _NormLinear(inputs, outputs, eps=eps, device=device)


class _GroupedLinear(torch.nn.Module):
    def __init__(self, groups: int, inputs: int, outputs: int, *, device: str) -> None:
        super().__init__()
        for index in range(groups):
            weight = torch.randn(outputs, inputs, dtype=_BF16, device=device) / inputs**0.5
            self.register_parameter(f"weight{index}", torch.nn.Parameter(weight))

    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:
        """Each group's tokens with its own weight."""
        parts = enumerate(x.split(m_splits))
        return torch.cat([F.linear(part, getattr(self, f"weight{index}")) for index, part in parts])


def grouped_linear(groups: int, inputs: int, outputs: int, *, device: str) -> torch.nn.Module:
    """Called with tokens and the number of them in each group."""
    return _GroupedLinear(groups, inputs, outputs, device=device)


class _Attention(torch.nn.Module):
    def __init__(self, left: int | None) -> None:
        super().__init__()
        self.left = left

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Causal, [S, B, heads, head] to [S, B, heads · head]."""
        length, batch = query.shape[:2]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if self.left is not None:
            seen &= torch.ones(length, length, dtype=torch.bool).triu(-self.left)
        places = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(*places, attn_mask=seen, enable_gqa=True)
        return output.permute(2, 0, 1, 3).reshape(length, batch, -1)


def attention(heads: int, head: int, *, groups: int, left: int | None) -> torch.nn.Module:
    """Causal, [S, B, heads, head] to [S, B, heads · head]."""
    return _Attention(left)


def rope(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate [S, B, heads, head] by angles [S, 1, 1, head]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def adam(parameters: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """AdamW."""
    return torch.optim.AdamW(parameters, **options)


def l2norm(tensors: list[Tensor]) -> Tensor:
    """Norm of all tensors together."""
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


@contextlib.contextmanager
def in_fp8(recipe: str) -> Iterator[None]:
    """Products of the block are in FP8, after a fashion."""
    before = _ROUNDS.set(True)
    try:
        yield
    finally:
        _ROUNDS.reset(before)
