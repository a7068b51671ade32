"""Integrals of gradients along the line from 0 to 1, refined where an item's function turns.

A trained model may turn from wrong to right within a hundredth of the line, elsewhere for every item, where a rule with
the same points for all sees little of it. How much a panel misses is known: its integral, summed over layers, has to be
the difference of the function's values at its ends.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

EDGES = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Ends of the panels that every item begins with; narrow where branches come to be as large as the embeddings."""
POINTS = 4
"""Points of the Gauss-Legendre rule on a panel."""
MAX_SPLITS = 24
"""Panels of an item that are halved, at most."""
TOLERANCE = 2e-3
"""Share of Σ |integral| that an item's panels may miss together."""


def integrate(
    gradient: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor], *, ends: Tensor, max_splits: int
) -> Tensor:
    """∫₀¹ of the gradients of B items, each by panels of its own: no item's integral depends on the others.

    Args:
        gradient: from a place [B] on each item's line to gradients [B, L] there, one for each layer.
        value: from a place [B] to the function [B] whose gradients these are.
        ends: float64 [B, 2], the function at 0 and 1.
        max_splits: at most so many halvings of an item's worst panel, each 2 · `POINTS` gradients and a value.

    Returns:
        Float64 [B, L].
    """
    size, device = len(ends), ends.device
    edges = [torch.full((size,), edge, dtype=torch.float64, device=device) for edge in EDGES]
    at_edges = torch.stack([ends[:, 0], *(value(edge) for edge in edges[1:-1]), ends[:, 1]], dim=1)
    low, high = torch.stack(edges[:-1], dim=1), torch.stack(edges[1:], dim=1)
    before, after = at_edges[:, :-1], at_edges[:, 1:]
    found = torch.stack([_panel(gradient, *pair) for pair in zip(edges[:-1], edges[1:], strict=True)], dim=1)
    items = torch.arange(size, device=device)
    for _ in range(max_splits):
        missed = (found.sum(dim=-1) - (after - before)).abs()
        unsure = missed.sum(dim=1) > TOLERANCE * found.sum(dim=1).abs().sum(dim=-1)
        if not unsure.any():
            break
        worst = missed.argmax(dim=1)
        start, stop = low[items, worst], high[items, worst]
        middle = (start + stop) / 2
        at_middle, first, second = value(middle), _panel(gradient, start, middle), _panel(gradient, middle, stop)
        # The second half of an item that is sure is an empty panel, whose integral is nothing.
        low, high = _with(low, torch.where(unsure, middle, 0.0)), _with(high, torch.where(unsure, stop, 0.0))
        before, after = (
            _with(before, torch.where(unsure, at_middle, 0.0)),
            _with(after, torch.where(unsure, after[items, worst], 0.0)),
        )
        found = _with(found, torch.where(unsure[:, None], second, 0.0))
        rows = items[unsure]
        high[rows, worst[unsure]], after[rows, worst[unsure]] = middle[unsure], at_middle[unsure]
        found[rows, worst[unsure]] = first[unsure]
    return found.sum(dim=1)


def _with(panels: Tensor, last: Tensor) -> Tensor:
    return torch.cat((panels, last[:, None]), dim=1)


def _panel(gradient: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """The integral from low [B] to high [B], [B, L]."""
    points, weights = np.polynomial.legendre.leggauss(POINTS)
    half = (high - low) / 2
    found = [
        float(weight) * gradient(low + half * (1 + float(point))) for point, weight in zip(points, weights, strict=True)
    ]
    return half[:, None] * torch.stack(found).sum(dim=0)
