"""Attention calls whose weights are known: what a model would hand its attention function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.sparsity.attention import Call, RowAttention

OFF = -1e4


def planted(weights: Tensor, *, width: int = 8) -> dict[str, Any]:
    """Arguments that give these softmax rows: `[heads, tokens, tokens]` of ones where a key shares the mass, else 0."""
    heads, tokens, _ = weights.shape
    value = torch.randn(1, heads, tokens, width, generator=torch.Generator().manual_seed(0))
    bias = torch.where(weights > 0, weights.clamp(min=1e-9).log(), OFF)
    nothing = torch.zeros(1, heads, tokens, width)
    return {"query": nothing, "key": nothing, "value": value, "position_bias": bias[None]}


def random_call(*, tokens: int = 80, window: int | None = None, sinks: bool = False, seed: int = 0) -> dict[str, Any]:
    """Arguments with four heads on two key heads, a soft cap, and what else is asked for."""
    generator = torch.Generator().manual_seed(seed)
    query = 3 * torch.randn(2, 4, tokens, 8, generator=generator)
    key, value = (torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(2))
    mask = torch.full((tokens, tokens), torch.finfo(torch.float32).min).triu(1)
    if window is not None:
        mask = mask + torch.full((tokens, tokens), torch.finfo(torch.float32).min).tril(-window)
    return {
        "query": query,
        "key": key,
        "value": value,
        "attention_mask": mask.expand(2, 1, tokens, tokens),
        "softcap": 4.0,
        "s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None,
    }


def attend(attention: RowAttention, module: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """The output of a call, `[batch, queries, heads, width]`."""
    return attention(module, **({"attention_mask": None} | arguments))[0]


def as_call(arguments: dict[str, Any]) -> Call:
    """The call that an attention sees."""
    seen: list[Call] = []

    class Note(RowAttention):
        def attend(self, layer: int | None, module: nn.Module, call: Call) -> Tensor:
            seen.append(call)
            return super().attend(layer, module, call)

    attend(Note([]), nn.Identity(), arguments)
    return seen[0]
