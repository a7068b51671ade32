"""Attention sinks in torch's scaled_dot_product_attention, which has none: one more key, whose value is zero.

A sink is a score s_h in the softmax's sum of head h, the same for every query. Here it is the product of one more
channel: queries hold s_h / scale there, the sink's key 1, all others 0. The key stands before the first, with a query
of its own where the mask is causal by itself, so that fused kernels keep their triangle.

Source: Xiao et al., Efficient Streaming Language Models with Attention Sinks (arXiv 2309.17453); OpenAI, gpt-oss (arXiv
2508.10925); transformers, models/gpt_oss/modeling_gpt_oss.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class WithSinks(NamedTuple):
    """Operands of attention.

    Attributes:
        query: [S, B, heads/TP, D + 1], or one token longer.
        key: [1 + S_key, B, groups/TP, D + 1].
        value: the same.
        mask: [(heads/TP,) S, 1 + S_key], or None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None


def with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, sinks: Tensor, *, scale: float
) -> WithSinks:
    """Operands whose attention has the sinks; `without_sinks` of the result is what it is without the additions.

    Args:
        query: [S, B, heads/TP, D].
        key: [S_key, B, groups/TP, D].
        value: the same.
        mask: whether each query sees each key, [(heads/TP,) S, S_key]; None: those before it, and itself.
        sinks: [heads/TP].
        scale: on the scores.
    """
    score = (sinks / scale).to(query.dtype)[:, None].expand(*query.shape[:-1], 1)
    query = torch.cat((query, score), dim=-1)
    key, value = F.pad(key, (0, 1)), F.pad(value, (0, 1))
    sink = torch.zeros_like(key[:1])
    sink[..., -1] = 1
    key, value = torch.cat((sink, key)), torch.cat((torch.zeros_like(sink), value))
    if mask is None:
        return WithSinks(torch.cat((query[:1], query)), key, value, None)
    return WithSinks(query, key, value, F.pad(mask, (1, 0), value=True))


def without_sinks(context: Tensor, *, is_causal: bool) -> Tensor:
    """[S, B, heads/TP, D + 1], a token longer where the mask was causal by itself → [S, B, heads/TP, D]."""
    return context[int(is_causal) :, ..., :-1]
