"""The three matrix products of a linear layer's training step, each by torch or by oneDNN, as chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecod_megatron.backend import onednn

TOKEN_THRESHOLD = 1024
"""Tokens from which it is faster to read the wider operand of a weight gradient without a transpose."""


def output(x: Tensor, weight: Tensor, by_onednn: bool, into: Tensor | None = None) -> Tensor:
    """x · weightᵀ: [..., in] and [out, in] → [..., out].

    Here and below oneDNN takes what is suited, if `by_onednn`; the result lies in `into` [..., out], if that is given.
    """
    return _product(x, weight, by_onednn, into)


def input_gradient(grad: Tensor, weight: Tensor, by_onednn: bool, into: Tensor | None = None) -> Tensor:
    """grad · weight: [..., out] and [out, in] → [..., in]."""
    return _product(grad, weight.t(), by_onednn, into)


def weight_gradient(grad: Tensor, x: Tensor, by_onednn: bool) -> Tensor:
    """gradᵀ · x: [tokens, out] and [tokens, in] → [out, in]."""
    # The first operand is transposed before, which costs most where it is large, and a transposed result costs too.
    if grad.shape[1] > x.shape[1] and len(x) >= TOKEN_THRESHOLD:
        return _product(x.t(), grad.t(), by_onednn).t()
    return _product(grad.t(), x.t(), by_onednn)


def add_weight_gradient(main_grad: Tensor, grad: Tensor, x: Tensor, by_onednn: bool) -> None:
    """main_grad [out, in] += gradᵀ · x, for [tokens, out] and [tokens, in]."""
    if main_grad.dtype == grad.dtype and not (by_onednn and onednn.is_suited(grad.t(), x.t())):
        main_grad.addmm_(grad.t(), x)
    else:
        main_grad.add_(weight_gradient(grad, x, by_onednn))


def repeated_size(rows: int) -> int:
    """The next of few sizes, less than 16 rows or a sixteenth above."""
    step = 1 << max(4, rows.bit_length() - 5)
    return -(-rows // step) * step


def _product(x: Tensor, weight: Tensor, by_onednn: bool, into: Tensor | None = None) -> Tensor:
    if not (by_onednn and onednn.is_suited(x, weight)):
        return torch.matmul(x, weight.t(), out=into)
    rows = onednn.linear(x, weight)
    return rows if into is None else into.copy_(rows)
