"""Matrix products of a forward pass by oneDNN, where the library that torch prefers would use half of the processor.

torch hands fp32 products on a CPU to Intel's MKL, which takes its AVX2 kernels on other makers' processors; oneDNN,
also part of torch, takes AVX-512 wherever there is one and is about twice as fast there. Both compute in fp32.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEWEST_PRODUCTS = 1 << 20
"""Multiplications of a product for which setting oneDNN up costs less than it saves."""


def fast_products() -> contextlib.AbstractContextManager[Any]:
    """Context in which linear layers on the CPU use the faster of the two libraries; elsewhere it changes nothing."""
    return _OneDnnLinears() if _is_faster() else contextlib.nullcontext()


class _OneDnnLinears(TorchFunctionMode):
    """Sends every large fp32 `linear` without gradients to oneDNN."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and _is_suited(args[0], args[1]):
            bias = args[2] if len(args) > 2 else None
            return torch.ops.mkldnn._linear_pointwise(args[0], args[1], bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _is_suited(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.dim() > 1
        and x.numel() * len(weight) >= FEWEST_PRODUCTS
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    )


@functools.cache
def _is_faster() -> bool:
    """Whether MKL is in use on a processor with AVX-512 that is not Intel's."""
    information = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and information.is_file()
        and "GenuineIntel" not in information.read_text(encoding="utf-8")
    )
