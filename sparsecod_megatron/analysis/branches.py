"""Whether a block computed in another way is still itself, judged by what it adds to the residual stream.

Not by its output: one massive channel of the residual stream would hide a wrong branch behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}
"""Limits of `branch_error`, by the model's dtype."""


def branch_error(before: Tensor, after: Tensor, other: Tensor) -> float:
    """Norm of the difference of two outputs of a block, relative to what the block adds.

    Half precision rounds the sum of stream and branch, and no branch can be known better than that, so as much of the
    difference does not count.

    Args:
        before: the block's input, `[..., d]`.
        after: its output.
        other: its output computed in another way.

    Returns:
        0 where a block that adds nothing still adds nothing, infinity where it adds something.
    """
    return float(token_errors(*(part.reshape(1, -1) for part in (before, after, other))))


def token_errors(before: Tensor, after: Tensor, other: Tensor) -> Tensor:
    """`branch_error` of each token by itself: `[..., d]` each → `[...]`, float64."""
    rounding = torch.finfo(after.dtype).eps * after.double().norm(dim=-1) / 2
    excess = ((other.double() - after.double()).norm(dim=-1) - rounding).clamp_min(0)
    branch = (after.double() - before.double()).norm(dim=-1)
    return torch.where(excess == 0, 0.0, excess / branch)  # infinite without a branch
