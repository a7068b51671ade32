"""DSnoT: weights of a mask change places until the pruned ones' mean contribution to each output is near zero.

Source: arXiv 2310.08915, with its sign rule. The cycles are relative to the width (50 at 4,096, as there), the
threshold to the outputs, and the variance is that of all inputs. The published code runs 50 cycles at any width,
without the sign rule unless the pattern is n:m, and against a threshold that depends on the length of a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecod_megatron.compression.parts import row_parts
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
    mean, variance = statistics.mean.float(), statistics.variance.float()
    variance = variance.clamp_min(1e-12 * float(variance.max()) or 1.0)
    outputs = torch.cat([(weight[rows].float() * mean).sum(1) for rows in row_parts(weight)])
    end = THRESHOLD * float(outputs.square().mean().sqrt())
    most = max(1, round(CYCLES_PER_COLUMN * weight.shape[1])) if cycles is None else cycles
    kept = mask.clone()
    for rows in row_parts(weight):
        part = weight[rows].float()
        share, importance = part * mean, part.abs() * statistics.norms
        _swap_rows(kept[rows], share, share / variance, importance, pattern, most, end)
    return kept


def _swap_rows(
    kept: Tensor, share: Tensor, ease: Tensor, importance: Tensor, pattern: Pattern, cycles: int, end: float
) -> None:
    """`swap` of some rows, in place; matrices are `[rows, in]`.

    Args:
        kept: the mask.
        share: C.
        ease: C / Var[x].
        importance: |W|·‖X‖.
        pattern: of the mask.
        cycles: swaps of a row at most.
        end: |ε| at which a row is done.
    """
    error = share.masked_fill(kept, 0).sum(1)
    sign, rows = error.sign(), torch.arange(len(kept), device=kept.device)
    active = error.abs() > end
    for _ in range(cycles):
        gain, back = (sign[:, None] * ease).masked_fill_(kept, -torch.inf).max(1)
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


def _neighbourhood(kept: Tensor, column: Tensor, size: int) -> Tensor:
    """True in the `size` columns around the one given for each row."""
    columns = torch.arange(kept.shape[1], device=kept.device)
    return (columns // size)[None] == (column // size)[:, None]
