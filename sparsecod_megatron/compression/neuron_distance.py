"""How far pruning moves what each neuron, a row of a matrix, puts out: W₁ between its outputs before and after.

An error of outputs is small where a few outputs are far off, and a neuron that answers to many unlike inputs is what
pruning harms most; its whole distribution moves then. For as many samples before as after, W₁ is the mean distance of
the sorted outputs.

Source: arXiv 2405.15756, which prunes a copy for each cluster of inputs so that these distributions stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

DISTANCE_ROWS = 2048
"""Inputs by which neurons are compared, evenly spaced among those that clusters were looked for in."""


def neuron_distance(before: Tensor, after: Tensor) -> float | None:
    """Mean over neurons of W₁ between their outputs, in standard deviations of the outputs before.

    Args:
        before: `[rows, neurons]`.
        after: of the same inputs.

    Returns:
        None where every neuron's output before is constant, so that there is no scale.
    """
    before, after = before.double(), after.double()
    spread = before.std(0, correction=0)
    moved = (before.sort(0).values - after.sort(0).values).abs().mean(0)
    alive = spread > 0
    return float((moved[alive] / spread[alive]).mean()) if bool(alive.any()) else None


def spaced(rows: Tensor) -> Tensor:
    """At most `DISTANCE_ROWS` of the rows, evenly spaced."""
    if len(rows) <= DISTANCE_ROWS:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, DISTANCE_ROWS, device=rows.device).round().long()]
