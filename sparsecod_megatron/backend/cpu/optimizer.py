"""Checks for CUDA tensors in Megatron-Core's optimizer package, answered for the CPU."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer import optimizer as optimizer_module

from sparsecod_megatron.backend.redirection import Redirection


@torch.no_grad()
def clip_grad_by_total_norm(
    parameters: list[torch.nn.Parameter], max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Scale all gradients in place by max_norm / total_norm if that is below one. Local: the norm is global already."""
    coefficient = max_norm / (total_norm + 1.0e-6)
    grads = [param.grad for param in parameters if param.grad is not None]
    if coefficient < 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Makes `tensor.type()` say torch.cuda.*, by which Megatron sorts parameters into fp32 and 16-bit ones."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _under_cuda_type_names(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        with _cuda_type_names():
            init(self, *args, **kwargs)

    return wrapped


def redirections() -> list[Redirection]:
    """Redirections of Megatron-Core's optimizer package."""
    table: list[tuple[Any, str, Any, str, str]] = [
        (
            distrib_optimizer.DistributedOptimizer,
            "__init__",
            _under_cuda_type_names(distrib_optimizer.DistributedOptimizer.__init__),
            "optimizer/distrib_optimizer.py:361/420/582",
            "compares type names with torch.cuda.*",
        ),
        (
            optimizer_module.Float16OptimizerWithFloat16Params,
            "__init__",
            _under_cuda_type_names(optimizer_module.Float16OptimizerWithFloat16Params.__init__),
            "optimizer/optimizer.py:671/690",
            "compares type names with torch.cuda.*",
        ),
        (
            optimizer_module,
            "clip_grad_by_total_norm_fp32",
            clip_grad_by_total_norm,
            "optimizer/clip_grads.py:167",
            "asserts the type name torch.cuda.FloatTensor",
        ),
    ]
    return [Redirection(*row) for row in table]
