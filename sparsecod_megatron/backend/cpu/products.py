"""The three matrix products of a linear layer's training step, each by the faster library."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecod_megatron.backend import onednn

MANY_TOKENS = 1024
"""From so many on, the wider operand of a weight gradient is better read as it lies."""


def output(x: Tensor, weight: Tensor) -> Tensor:
    """x · weightᵀ: [..., in] and [out, in] → [..., out]."""
    return _product(x, weight)


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad · weight: [..., out] and [out, in] → [..., in]."""
    return _product(grad, weight.t())


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ · x: [tokens, out] and [tokens, in] → [out, in]."""
    # The first operand is transposed before, which costs most where it is large, and a transposed result costs too.
    if grad.shape[1] > x.shape[1] and len(x) >= MANY_TOKENS:
        return _product(x.t(), grad.t()).t()
    return _product(grad.t(), x.t())


def add_weight_gradient(main_grad: Tensor, grad: Tensor, x: Tensor) -> None:
    """main_grad [out, in] += gradᵀ · x, for [tokens, out] and [tokens, in]."""
    if main_grad.dtype == grad.dtype and not _by_onednn(grad.t(), x.t()):
        main_grad.addmm_(grad.t(), x)
    else:
        main_grad.add_(weight_gradient(grad, x))


def repeated_size(rows: int) -> int:
    """The next of few sizes, less than 16 rows or a sixteenth above, where every new shape costs; else `rows`."""
    if not onednn.is_faster():
        return rows
    step = 1 << max(4, rows.bit_length() - 5)
    return -(-rows // step) * step


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return onednn.linear(x, weight) if _by_onednn(x, weight) else torch.matmul(x, weight.t())


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    return onednn.is_faster() and onednn.is_suited(x, weight)
