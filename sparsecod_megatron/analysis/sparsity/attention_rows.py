"""Statistics of attention rows: how many keys a query really uses, and whether it rests on the first token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILONS = (0.01, 0.1, 1.0)
MASS = 0.95
STATISTICS = (
    *(f"mass_below_{epsilon:g}" for epsilon in EPSILONS),
    "square_sum",
    "entropy",
    "entropy_visible",
    "keys_95",
    "sink",
    "distance_tokens",
)
_SLACK = 1e-6  # 19 equal weights of 20 sum to 0.95 only up to rounding


def row_statistics(weights: Tensor, visible: Tensor, first_query: int, seq_length: int) -> Tensor:
    """All `STATISTICS` of each row of attention weights.

    Args:
        weights: softmax rows α `[..., queries, keys]`, fp32; masked keys are 0.
        visible: number of keys the mask lets each query see, broadcastable to `[..., queries]`.
        first_query: position of the first of these queries.
        seq_length: T, tokens of the sequence.

    Returns:
        `[..., queries, statistics]`: mass of keys with α < ε/T for each of `EPSILONS`; Σα²; entropy ÷ log T; entropy ÷
        log of the visible keys (0 where one key is visible); fewest keys that hold 95 % of the mass; mass of the first
        token; mean distance in tokens from query to key.
    """
    below = [torch.where(weights < epsilon / seq_length, weights, 0).sum(-1) for epsilon in EPSILONS]
    entropy = torch.special.entr(weights).sum(-1)
    visible = visible.to(weights.dtype).expand(entropy.shape)
    keys = (weights.sort(-1, descending=True).values.cumsum(-1) < (MASS - _SLACK)).sum(-1) + 1
    positions = torch.arange(weights.shape[-1], device=weights.device, dtype=weights.dtype)
    queries = torch.arange(first_query, first_query + weights.shape[-2], device=weights.device, dtype=weights.dtype)
    total = weights.sum(-1)
    return torch.stack(
        [
            *below,
            weights.square().sum(-1),
            entropy / math.log(max(seq_length, 2)),
            torch.where(visible > 1, entropy / visible.clamp(min=2).log(), 0),
            keys.clamp(max=weights.shape[-1]).to(weights.dtype),
            weights[..., 0],
            queries * total - weights @ positions,
        ],
        dim=-1,
    )
