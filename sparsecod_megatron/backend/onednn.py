"""fp32 matrix products by oneDNN, in place of the library that torch prefers.

torch hands fp32 products on a CPU to Intel's MKL. oneDNN, also part of torch, takes half the time on some processors
and more on others (`choice.py` finds out); both compute in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_PRODUCTS = 1 << 20
"""Multiplications of a product from which oneDNN saves more than its set-up costs."""


def is_available() -> bool:
    """Whether torch has both libraries, so that there is something to choose."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def is_suited(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these operands, [..., in] and [out, in], and may be worth it."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() * len(weight) >= MIN_PRODUCTS
        # A second operand with gaps between rows takes oneDNN's reference loop, about a thousand times as slow
        # (benchmarks/products.py); the layout of the first does not matter.
        and (weight.is_contiguous() or weight.t().is_contiguous())
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, as `torch.nn.functional.linear`, without gradients; fast for strides that are suited.

    Args:
        x: [..., in].
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out].
    """
    rows: Tensor = torch.ops.mkldnn._linear_pointwise(x.flatten(0, -2), weight, bias, "none", [], "")
    # As torch's matmul: no view, which autograd would not let be changed in place.
    return torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], len(weight)])
