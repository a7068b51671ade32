"""Tokens into the order of their experts and back: the sum over a token's experts in one pass over the rows.

Megatron-Core adds rows one after another into a tensor of zeros, forward (`scatter_add_`) and in the gradient of the
permutation (`index_add_`). A bag of rows for each token takes a third of the time, in the same order of additions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.moe import token_dispatcher
from torch import Tensor

_permute: Any = getattr(token_dispatcher, "permute", None)  # upstream may drop names: then nothing is replaced
_unpermute: Any = getattr(token_dispatcher, "unpermute", None)


class Permute(torch.autograd.Function):
    """Row i of the result is token `indices[i]`."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, indices: Tensor) -> Tensor:
        """[tokens, H] and [rows] → [rows, H]."""
        ctx.save_for_backward(indices)
        ctx.count = len(tokens)
        return tokens.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """[rows, H] → [tokens, H]."""
        (indices,) = ctx.saved_tensors
        return _sums(grad, indices, ctx.count), None


class Unpermute(torch.autograd.Function):
    """Every token is the sum of its rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, indices: Tensor, count: int) -> Tensor:
        """[rows, H], the token of each row [rows], and the number of tokens → [tokens, H]."""
        ctx.save_for_backward(indices)
        return _sums(rows, indices, count)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """[tokens, H] → [rows, H]."""
        (indices,) = ctx.saved_tensors
        return grad.index_select(0, indices), None, None


def _sums(rows: Tensor, indices: Tensor, count: int) -> Tensor:
    """Sum of the rows of each of `count` tokens, in the order in which they lie; [rows, H] → [tokens, H]."""
    sizes = torch.bincount(indices, minlength=count)
    return F.embedding_bag(indices.argsort(stable=True), rows, sizes.cumsum(0) - sizes, mode="sum")


def permute(
    tokens: Tensor,
    routing_map: Tensor,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Tokens [tokens, H] in the order of experts, their probabilities, and the token of each row.

    Source: Megatron-Core transformer/moe/moe_utils.py, `permute`.
    """
    if tokens.dtype != torch.float32:
        return _permute(tokens, routing_map, probs, num_out_tokens, fused, drop_and_pad)
    # Upstream's order, found with rows of no width.
    nothing = tokens.detach()[:, :0]
    _, permuted_probs, indices = _permute(nothing, routing_map, probs, num_out_tokens, fused, drop_and_pad)
    return Permute.apply(tokens, indices), permuted_probs, indices


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: torch.Size,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    fused: bool = False,
    drop_and_pad: bool = False,
) -> Tensor:
    """Sums of rows [rows, H] by token, [tokens, H]; rows that are yet to be weighted are upstream's.

    Source: Megatron-Core transformer/moe/moe_utils.py, `unpermute`.
    """
    if permuted_tokens.dtype != torch.float32 or probs is not None:
        return _unpermute(permuted_tokens, sorted_indices, restore_shape, probs, routing_map, fused, drop_and_pad)
    return Unpermute.apply(permuted_tokens, sorted_indices, restore_shape[0])
