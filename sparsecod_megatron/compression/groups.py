"""Rounding by groups of neighbours in a row: GQSA's second half, after whole groups were pruned.

A group's 2^bits levels are even steps from its smallest to its largest weight; the smallest is kept as it is, where an
integer zero point would move it. Files hold the rounded values in the model's type; nothing is packed.

Source: arXiv 2412.17560, without its two stages of tuning and its kernel. The saliency is OBS's own, w² / [H⁻¹]_jj.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_BITS = 16
"""As many as leave the values as they are."""


def round_groups(values: Tensor, width: int, bits: int) -> Tensor:
    """Values on the levels of their groups.

    Args:
        values: `[out, in]`, float32; a pruned group is all zeros, and stays so.
        width: weights in a group, which divides `in`.
        bits: of a code; `EXACT_BITS` rounds nothing.
    """
    if bits == EXACT_BITS:
        return values
    groups = values.unflatten(-1, (-1, width))
    low = groups.amin(-1, keepdim=True)
    step = (groups.amax(-1, keepdim=True) - low) / (2**bits - 1)
    codes = (groups - low).div_(torch.where(step > 0, step, 1)).round_()
    return codes.mul_(step).add_(low).flatten(-2)
