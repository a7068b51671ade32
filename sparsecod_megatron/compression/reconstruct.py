"""SparseGPT's second half: the remaining weights make up for the pruned ones.

Source: arXiv 2301.00774, algorithm 1, for a mask that is already chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_SIZE = 128
"""Columns whose errors reach the columns to their right in one product."""


def reconstruct(weight: Tensor, mask: Tensor, hessian: Tensor, *, damping: float) -> Tensor:
    """Drop weights column by column, and after each column move the later ones to where the outputs change least.

    Args:
        weight: `[out, in]`.
        mask: bool `[out, in]`, True where a weight stays.
        hessian: `[in, in]`, Σ x·xᵀ over the layer's inputs, up to a factor.
        damping: added to the hessian's diagonal, as a share of the diagonal's mean.

    Returns:
        `[out, in]` in the weight's dtype, zero where the mask is False.
    """
    working, factor = weight.float().clone(), _inverse_factor(hessian, damping)
    for start in range(0, working.shape[1], BLOCK_SIZE):
        block = slice(start, min(start + BLOCK_SIZE, working.shape[1]))
        columns, kept, within = working[:, block], mask[:, block], factor[block, block]
        errors = torch.zeros_like(columns)
        for column in range(columns.shape[1]):
            errors[:, column] = columns[:, column].masked_fill(kept[:, column], 0) / within[column, column]
            columns[:, column:] -= torch.outer(errors[:, column], within[column, column:])
        working[:, block.stop :] -= errors @ factor[block, block.stop :]
    return (working * mask).to(weight.dtype)


def _inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """Upper triangular U with UᵀU = (H + damping)⁻¹; row j over U[j, j] is how later columns answer to column j."""
    damped = hessian.float().clone()
    damped.diagonal().add_(damping * damped.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
