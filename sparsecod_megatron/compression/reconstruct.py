"""Remaining weights that make up for the pruned ones: SparseGPT's sweep over columns, and masked conjugate gradients.

Both lessen `tr((V − W) H (V − W)ᵀ)`, the error of the outputs, over matrices V that are zero where the mask is. The
sweep lets weights to the right of a pruned one answer, once, and can choose the mask on its way; conjugate gradients
find the optimum of a mask.

Source: the sweep: arXiv 2301.00774, algorithm 1. Conjugate gradients: the last step of ALPS, arXiv 2406.07831.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecod_megatron.compression.parts import row_parts
from sparsecod_megatron.compression.patterns import Pattern

BLOCK_SIZE = 128
"""Columns whose errors reach the columns to their right in one product, and which compete in a share's mask."""


def sweep(weight: Tensor, hessian: Tensor, choice: Tensor | Pattern, *, damping: float) -> tuple[Tensor, Tensor]:
    """Drop weights column by column, and after each column move the later ones to where the outputs change least.

    Where a pattern is given, weights of the lowest w² / U²_jj go: those whose loss costs least once everything to their
    right answers. n:m decides when a column of the m is reached, a share once per 128 columns, among all rows of them
    unless the pattern is by rows.

    Args:
        weight: `[out, in]`.
        hessian: `[in, in]`, Σ x·xᵀ over the layer's inputs, up to a factor; overwritten.
        choice: mask, bool `[out, in]`, True where a weight stays; or the pattern that the mask is to follow.
        damping: added to the hessian's diagonal, as a share of the diagonal's mean.

    Returns:
        `[out, in]` float32, zero where the mask is False, and the mask.
    """
    factor = inverse_factor(hessian, damping)
    working = weight.to(torch.float32, copy=True)
    scales = factor.diagonal().square()
    mask = choice.clone() if isinstance(choice, Tensor) else torch.ones_like(working, dtype=torch.bool)
    pattern = choice if isinstance(choice, Pattern) else None
    period = pattern.period if pattern else 1
    size = max(period, BLOCK_SIZE // period * period)
    for start in range(0, working.shape[1], size):
        block = slice(start, min(start + size, working.shape[1]))
        columns, kept, within = working[:, block], mask[:, block], factor[block, block]
        if pattern and pattern.group != "neighbours":
            kept.copy_(pattern.keep(columns.square() / scales[block]))
        errors = torch.zeros_like(columns)
        for column in range(columns.shape[1]):
            if pattern and pattern.group == "neighbours" and column % period == 0:
                here = slice(column, column + period)
                kept[:, here] = pattern.keep(columns[:, here].square() / scales[block][here])
            errors[:, column] = columns[:, column].masked_fill(kept[:, column], 0) / within[column, column]
            columns[:, column:] -= torch.outer(errors[:, column], within[column, column:])
        working[:, block.stop :] -= errors @ factor[block, block.stop :]
    return working.mul_(mask), mask


def conjugate_gradients(
    weight: Tensor, hessian: Tensor, mask: Tensor, start: Tensor, *, damping: float, steps: int
) -> Tensor:
    """The best values for a mask, all rows at once, each with its own step lengths.

    The operator is P ↦ (P·H) ⊙ M, the preconditioner its diagonal; a step costs one product.

    Args:
        weight: W, `[out, in]`, whose outputs are wanted.
        hessian: H, `[in, in]`, Σ x·xᵀ over the layer's inputs, up to a factor; damped in place.
        mask: M, bool `[out, in]`, True where a weight stays.
        start: `[out, in]`, values to begin with.
        damping: added to the hessian's diagonal, as a share of the diagonal's mean: a pull towards W.
        steps: number of steps.

    Returns:
        `[out, in]` float32, zero where the mask is False. No row's error is above its start's.
    """
    damped, result = _damped(hessian, damping), torch.empty_like(weight, dtype=torch.float32)
    # Rows are independent, so they are done in parts: a step holds six matrices of the weights' size.
    for rows in row_parts(weight):
        result[rows] = _descend(weight[rows].float(), damped, mask[rows], start[rows].float() * mask[rows], steps)
    return result


def _descend(target: Tensor, damped: Tensor, mask: Tensor, first: Tensor, steps: int) -> Tensor:
    """Conjugate gradients for a few rows, from `first`, which the mask has been applied to."""
    values, residual = first.clone(), ((target - first) @ damped).mul_(mask)
    scaled = residual / damped.diagonal()
    direction, power = scaled.clone(), (residual * scaled).sum(1)
    for _ in range(steps):
        image = (direction @ damped).mul_(mask)
        curvature = (direction * image).sum(1)
        length = torch.where(curvature > 0, power / curvature, torch.zeros_like(power))[:, None]
        values += length * direction
        residual -= image.mul_(length)
        torch.div(residual, damped.diagonal(), out=scaled)
        next_power = (residual * scaled).sum(1)
        turn = torch.where(power > 0, next_power / power, torch.zeros_like(power))[:, None]
        direction.mul_(turn).add_(scaled)
        power = next_power
    better = row_errors(values - target, damped) <= row_errors(first - target, damped)
    return torch.where(better[:, None], values, first)


def row_errors(change: Tensor, hessian: Tensor) -> Tensor:
    """δ H δᵀ of each row δ, float32 `[out]`: what a change of weights `[out, in]` costs in squared outputs."""
    return (change @ hessian).mul_(change).sum(1)


def squared_outputs(new: Tensor, old: Tensor, gram: Tensor) -> tuple[float, float]:
    """‖X(W' − W)ᵀ‖² and ‖XWᵀ‖².

    Args:
        new: W', `[out, in]`.
        old: W, float32 `[out, in]`.
        gram: Σ x·xᵀ over the inputs, float32 `[in, in]`.
    """
    parts = [
        torch.stack([row_errors(matrix, gram).double().sum() for matrix in (new[rows].float() - old[rows], old[rows])])
        for rows in row_parts(old)
    ]
    change, size = torch.stack(parts).sum(0).tolist()
    return change, size


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with UᵀU = (H + damping)⁻¹; row j over U[j, j] is how later columns answer to column j.

    Args:
        hessian: H, `[in, in]`; overwritten by the result where it lies column by column in memory.
        damping: as a share of the mean of H's diagonal.
    """
    factor = _damped(hessian, damping)
    torch.linalg.cholesky(factor, out=factor)
    torch.cholesky_inverse(factor, out=factor)
    return torch.linalg.cholesky(factor, upper=True, out=factor)


def _damped(hessian: Tensor, damping: float) -> Tensor:
    """The same, changed in place."""
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return hessian
