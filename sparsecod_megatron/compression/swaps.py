"""DSnoT: weights of a mask change places until the pruned ones' mean contribution to each output is near zero.

Source: arXiv 2310.08915, with its sign rule. The cycles are relative to the width (50 at 4,096, as there), the
threshold to the outputs, and the variance is that of all inputs. The published code runs 50 cycles at any width,
without the sign rule unless the pattern is n:m, and against a threshold that depends on the length of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecod_megatron.compression.patterns import Pattern
from sparsecod_megatron.compression.statistics import InputStatistics

CYCLES_PER_COLUMN = 50 / 4096
"""Swaps of a row, relative to its width."""
THRESHOLD = 1e-3
"""A row is done when its error is below this share of the outputs' root mean square."""


def swap(weight: Tensor, mask: Tensor, statistics: InputStatistics, pattern: Pattern, cycles: int | None) -> Tensor:
    """Exchange one kept and one pruned weight of every row per cycle, while that brings the row's error nearer zero.

    With C = W ⊙ E[x], a row's error is ε = Σ_pruned C. The pruned weight of the largest sign(ε)·C / Var[x] comes back;
    for it goes the kept one of the lowest |W|·‖X‖ among those that move ε the same way, or, for n:m, in the same
    neighbourhood. A row ends before ε would change its sign or grow, and at `THRESHOLD`.

    Args:
        weight: `[out, in]`.
        mask: bool `[out, in]`, True where a weight stays.
        statistics: of the inputs.
        pattern: that the mask follows, before and after.
        cycles: swaps of a row at most; None is `CYCLES_PER_COLUMN` of the width, at least one.

    Returns:
        The new mask, with as many zeros in every row, and in every neighbourhood of n:m.
    """
    assert pattern.width == 1, "groups stay or go whole"
    kept, weight = mask.clone(), weight.float()
    share = weight * statistics.mean.float()
    variance = statistics.variance.float()
    ease = share / variance.clamp_min(1e-12 * float(variance.max()) or 1.0)
    importance = weight.abs() * statistics.norms
    error = share.masked_fill(kept, 0).sum(1)
    sign, rows = error.sign(), torch.arange(len(weight), device=weight.device)
    end = THRESHOLD * float(share.sum(1).square().mean().sqrt())
    active = error.abs() > end
    for _ in range(max(1, round(CYCLES_PER_COLUMN * weight.shape[1])) if cycles is None else cycles):
        gain, back = (sign[:, None] * ease).masked_fill(kept, -torch.inf).max(1)
        going = kept & (_neighbourhood(kept, back, pattern.of) if pattern.of else sign[:, None] * share < 0)
        cost, gone = importance.masked_fill(~going, torch.inf).min(1)
        moved = error - share[rows, back] + share[rows, gone]
        active &= (gain > 0) & cost.isfinite() & (moved * sign >= 0) & (moved.abs() < error.abs())
        if not active.any():
            break
        here = rows[active]
        kept[here, back[active]], kept[here, gone[active]] = True, False
        error = torch.where(active, moved, error)
        active &= error.abs() > end
    return kept


def _neighbourhood(kept: Tensor, column: Tensor, size: int) -> Tensor:
    """True in the `size` columns around the one given for each row."""
    columns = torch.arange(kept.shape[1], device=kept.device)
    return (columns // size)[None] == (column // size)[:, None]
