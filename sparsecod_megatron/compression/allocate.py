"""How much of each block goes: more where a block changes the residual stream less, and the asked share on the whole.

The influence of a block is the mean angle between the stream before and after it, which CFSP (arXiv 2409.13199) turns
into shares by a sigmoid of a sum over tokens, so that they depend on how much text there is. Here the shares are linear
in the influence, which makes the total exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def angles(before: Tensor, after: Tensor) -> Tensor:
    """Angle between hidden states over π, float64 `[...]` of `[..., d]`: 0 where a block only scales."""
    cosine = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / torch.pi


def shares(sparsity: float, influences: Sequence[float], sizes: Sequence[int], spread: float) -> list[float]:
    """The share of weights to drop in each block.

    keep_l = k + spread · min(k, 1 − k) · d_l, with k = 1 − sparsity and d_l the influence of block l less the mean over
    weights, over the largest such difference.

    Args:
        sparsity: share on the whole.
        influences: influence of each block.
        sizes: weights of each block that can be pruned.
        spread: how far blocks may differ, 0 (not at all) to 1 (a block may be left whole, or emptied).

    Returns:
        Shares whose mean over weights is `sparsity`.
    """
    found, weights = torch.tensor(influences, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    apart = found - (found * weights).sum() / weights.sum()
    largest = float(apart.abs().max())
    if largest == 0:
        return [sparsity] * len(influences)
    reach = spread * min(sparsity, 1 - sparsity)
    return (sparsity - reach * apart / largest).tolist()
