"""fp32 matrix products by oneDNN, where the library that torch prefers would use half of the processor.

torch hands fp32 products on a CPU to Intel's MKL, which takes its AVX2 kernels on other makers' processors; oneDNN,
also part of torch, takes AVX-512 wherever there is one and is about twice as fast there. Both compute in fp32.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Tensor

FEWEST_PRODUCTS = 1 << 20
"""Multiplications of a product for which setting oneDNN up costs less than it saves."""


@functools.cache
def is_faster() -> bool:
    """Whether MKL is in use on a processor with AVX-512 that is not Intel's."""
    information = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and information.is_file()
        and "GenuineIntel" not in information.read_text(encoding="utf-8")
    )


def is_suited(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these operands, [..., in] and [out, in], and is worth it."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() * len(weight) >= FEWEST_PRODUCTS
        # A second operand with gaps between rows takes oneDNN's reference loop, about a thousand times as slow
        # (benchmarks/products.py); the first may lie anyhow.
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
