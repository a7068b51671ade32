"""A transformers model's forward pass in float64, without holding the model, or even a block of it, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

PIECE = 2**21
"""Elements of a matrix that are in memory in float64 at a time: 16 MiB."""


@contextmanager
def computing_in_float64(model: Any) -> Iterator[None]:
    """While the block runs, an fp32 causal language model computes in float64. Local.

    Embeddings are widened exactly, and what meets them becomes as wide: torch widens the weights of elementwise
    operations, and those of products and norms are widened here, a few rows at a time. The model itself stays as it is,
    so weights that are mapped from a file stay the file's. What the class itself computes in fp32 (the statistics of
    norms, rotary tables, router probabilities) stays so.
    """
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.double())
    # The products of all experts at once that torch has know no float64.
    experts = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        with _WideWeights():
            yield
    finally:
        model.set_experts_implementation(experts)
        handle.remove()


_WIDENED = (F.rms_norm, F.layer_norm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
"""Norms; and products of classes that multiply by a parameter themselves, as GPT-OSS's experts do."""


class _WideWeights(TorchFunctionMode):
    """Products and norms of float64 activations take fp32 weights, which torch itself refuses or warns about."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and args[0].dtype == torch.float64:
            return _product(*args, **(kwargs or {}))
        if func in _WIDENED and args[0].dtype == torch.float64:
            args = [_widened(arg) for arg in args]
            kwargs = {name: _widened(arg) for name, arg in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widened(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) else argument


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, [..., in] and [out, in] to [..., out]."""
    if weight.dtype == torch.float64:
        return F.linear(x, weight, bias)
    output = x.new_empty((*x.shape[:-1], weight.shape[0]))
    rows = max(1, PIECE // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        part = slice(start, start + rows)
        output[..., part] = F.linear(x, weight[part].double(), None if bias is None else bias[part].double())
    return output
