"""How many weights of each matrix live: the same share everywhere, or more in small matrices (ERK).

Shapes are those of whole matrices as a GPTModel stores them (gate over up is one), and every expert's is one of its
own, so that the counts do not depend on the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Shape = tuple[int, ...]


def uniform(shapes: Sequence[tuple[Shape, int]], density: float) -> dict[Shape, float]:
    """The same density for every shape.

    Args:
        shapes: each shape, and how many matrices have it.
        density: share of weights that live.
    """
    return {shape: density for shape, _ in shapes}


def erk(shapes: Sequence[tuple[Shape, int]], density: float) -> dict[Shape, float]:
    """Density ∝ Σ dims / Π dims, so that all matrices together have `density`; those that would exceed 1 are dense.

    Args:
        shapes: each shape, and how many matrices have it.
        density: share of all weights that live.

    Source: Evci et al., Rigging the Lottery (arXiv 1911.11134), Erdős–Rényi-Kernel; with two dimensions Erdős–Rényi.
    """
    total = sum(count * math.prod(shape) for shape, count in shapes)
    dense: set[Shape] = set()
    while True:
        wanted = density * total - sum(count * math.prod(shape) for shape, count in shapes if shape in dense)
        raw = sum(count * sum(shape) for shape, count in shapes if shape not in dense)
        scale = wanted / raw if raw else 0.0
        found = {shape: scale * sum(shape) / math.prod(shape) for shape, _ in shapes if shape not in dense}
        above = {shape for shape, value in found.items() if value > 1}
        if not above:
            return found | dict.fromkeys(dense, 1.0)
        dense |= above


DISTRIBUTIONS = {"uniform": uniform, "erk": erk}
