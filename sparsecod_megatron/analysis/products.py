"""Matrix products of a forward pass by oneDNN, where that is faster than the library that torch prefers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sparsecod_megatron.backend import choice, onednn


def fast_products(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which linear layers on the CPU use the faster of the two libraries; elsewhere it changes nothing.

    Collective over all processes.
    """
    return _OneDnnLinears() if device.type == "cpu" and choice.agree().output else contextlib.nullcontext()


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
            return onednn.linear(args[0], args[1], bias)
        return func(*args, **(kwargs or {}))


def _is_suited(x: Tensor, weight: Tensor) -> bool:
    needs_gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return onednn.is_suited(x, weight) and not needs_gradient
