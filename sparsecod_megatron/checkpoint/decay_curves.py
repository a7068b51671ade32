"""Coefficients of a mean of checkpoints that stand for a decay of the learning rate; the command line names the curves.

At a constant rate, checkpoint j is θ_j = θ_0 − Σ_{i ≤ j} g_i, g_i being what the steps between two checkpoints moved.
With coefficients c_j that sum to one, Σ c_j θ_j = θ_0 − Σ w_i g_i where w_i = Σ_{j ≥ i} c_j: the weights of a run whose
updates had been scaled by w_i. So a curve that falls from 1 to 0 gives c_0 = 1 − w_1, c_j = w_j − w_{j+1}, c_k = w_k.

Source: Tian et al., WSM (arXiv 2507.17634), equation of the merged model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "1-sqrt": lambda share: 1 - math.sqrt(share),
}
"""Decay curves: share of the way → share of the learning rate. `linear` gives the plain mean."""


def coefficients(curve: str, count: int) -> list[float]:
    """c_j of `count` checkpoints, oldest first, that stand for a curve of `CURVES`; they sum to one."""
    shares = [CURVES[curve](step / count) for step in range(1, count)]
    return [after - before for after, before in zip([1.0, *shares], [*shares, 0.0], strict=True)]
