"""Invertible layout changes between a group of Megatron tensors and a group of HuggingFace tensors.

Each knows its shapes on both sides, so that a table can be checked, and files planned, before any weight is read. All
are exact in every floating-point type, rows being moved or multiplied by a power of two, but one: `folded` rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecod_megatron.errors import ConversionError

Shape = tuple[int, ...]
Conversion = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Transform:
    """Both directions of one layout change. Results may be views of the arguments.

    Args:
        megatron_shapes: one for each Megatron tensor, in order.
        hf_shapes: one for each HuggingFace tensor, in order.
        to_hf: Megatron tensors to HuggingFace tensors.
        to_megatron: the inverse; raises ConversionError for values that ours has no place for.
    """

    megatron_shapes: tuple[Shape, ...]
    hf_shapes: tuple[Shape, ...]
    to_hf: Conversion
    to_megatron: Conversion


def same(shape: Shape) -> Transform:
    """One tensor, the same on both sides."""
    return Transform((shape,), (shape,), to_hf=tuple, to_megatron=tuple)


def scaled(shape: Shape, factor: float) -> Transform:
    """One tensor, `hf = factor · megatron`; the factor is a power of two, so that both directions are exact."""
    assert factor > 0 and math.frexp(factor)[0] == 0.5, f"{factor} is not a power of two"
    return Transform(
        (shape,),
        (shape,),
        to_hf=lambda tensors: [tensor * factor for tensor in tensors],
        to_megatron=lambda tensors: [tensor / factor for tensor in tensors],
    )


def folded(shape: Shape, factor: float) -> Transform:
    """One tensor, `hf = factor · megatron` in fp32 for any factor: exact to the rounding of one product.

    Without effect, so exact, where the factor is 1.
    """
    if factor == 1.0:
        return same(shape)
    return Transform(
        (shape,),
        (shape,),
        to_hf=lambda tensors: [tensor.float() * factor for tensor in tensors],
        to_megatron=lambda tensors: [tensor.float() / factor for tensor in tensors],
    )


def gate_up(shape: Shape) -> Transform:
    """Megatron's gated `linear_fc1` `[2·ffn, hidden]`, gate rows above up rows, against gate and up `[ffn, hidden]`.

    Or their biases, `[2·ffn]` against `[ffn]`.
    """
    return Transform(
        (shape,),
        ((shape[0] // 2, *shape[1:]),) * 2,
        to_hf=lambda tensors: tensors[0].chunk(2, dim=0),
        to_megatron=lambda tensors: (torch.cat(tuple(tensors), dim=0),),
    )


def query_key_value(shape: Shape, heads: int, groups: int, *, gated: bool = False) -> Transform:
    """Megatron's `linear_qkv`, rows by query group as (its query heads, key, value), against separate q, k and v.

    Within a head the channels keep their order: Megatron's default rotary layout and HuggingFace's both turn channel
    `i` with channel `i + head_dim / 2`.

    Args:
        shape: of `linear_qkv`, `[heads of all three · channels of a head, hidden]`, or of its bias, without `hidden`.
        heads: query heads.
        groups: key and value heads.
        gated: each group holds the output gates of its heads after its queries; HuggingFace's gate follows v.

    Source: `SelfAttention.get_query_key_value_tensors` in megatron/core/transformer/attention.py.
    """
    per_group = heads // groups
    slots = [per_group, *([per_group] if gated else []), 1, 1]
    hidden, head_dim = shape[1:], shape[0] // (groups * sum(slots))

    def split(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        grouped = tensors[0].reshape(groups, sum(slots), head_dim, *hidden)
        query, *gate, key, value = (part.reshape(-1, *hidden) for part in grouped.split(slots, dim=1))
        return [query, key, value, *gate]

    def merge(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        query, key, value, *gate = (tensor.reshape(groups, -1, head_dim, *hidden) for tensor in tensors)
        return (torch.cat([query, *gate, key, value], dim=1).reshape(-1, *hidden),)

    query, key = (heads * head_dim, *hidden), (groups * head_dim, *hidden)
    parts = (query, key, key, query) if gated else (query, key, key)
    return Transform((shape,), parts, to_hf=split, to_megatron=merge)


def stacked(transform: Transform) -> Transform:
    """The same with all HuggingFace tensors above each other in one."""
    rows = [shape[0] for shape in transform.hf_shapes]
    return Transform(
        transform.megatron_shapes,
        ((sum(rows), *transform.hf_shapes[0][1:]),),
        to_hf=lambda tensors: (torch.cat(tuple(transform.to_hf(tensors)), dim=0),),
        to_megatron=lambda tensors: transform.to_megatron(tensors[0].split(rows, dim=0)),
    )


def zeros(*shapes: Shape) -> Transform:
    """HuggingFace tensors that ours has no counterpart of, and that change nothing when they are zero."""

    def check(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if any(bool(tensor.any()) for tensor in tensors):
            raise ConversionError(
                "holds values other than zero, which our model has no parameter for; use a model without"
            )
        return ()

    return Transform((), shapes, to_hf=lambda _: [torch.zeros(shape) for shape in shapes], to_megatron=check)
