"""How many weights a model needs: the largest sparsity that keeps the loss, and the knee of the pruning curve."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Interval, bootstrap

Array = npt.NDArray[np.float64]
GRID = tuple(step / 20 for step in range(20))  # 0 … 95 %
INCREASE_ALLOWED = 0.01
RESOLUTION = 1e-3


class LossCurve(Protocol):
    """Losses by sparsity, computed when asked for."""

    @property
    def sparsities(self) -> list[float]:
        """Sparsities evaluated so far, ascending."""
        ...

    def losses(self, sparsity: float) -> Tensor:
        """Mean loss of each sequence `[sequences]`."""
        ...


class Essential(NamedTuple):
    """What the curve says.

    Attributes:
        sparsity: the largest with ΔL/L ≤ 1 %, interpolated between points at most 0.1 % apart; the interval is over
            sequences.
        knee: the sparsity of `GRID` at which the curve lies farthest below the straight line between its ends.
    """

    sparsity: Interval
    knee: float


def find_essential(curve: LossCurve, *, seed: int) -> Essential:
    """Evaluate the grid, bisect the step in which the increase crosses 1 %, and find the knee.

    The loss may rise, fall and rise again; what counts is the last point of the grid within the allowance.

    Args:
        curve: curve of the model.
        seed: seed of the bootstrap.
    """
    dense = curve.losses(0.0)
    increases = [relative_increase(curve.losses(sparsity), dense) for sparsity in GRID]
    last = max(index for index, increase in enumerate(increases) if increase <= INCREASE_ALLOWED)  # 0 % always is
    if last + 1 < len(GRID):
        low, high = GRID[last], GRID[last + 1]
        while high - low > RESOLUTION:
            middle = (low + high) / 2
            is_allowed = relative_increase(curve.losses(middle), dense) <= INCREASE_ALLOWED
            low, high = (middle, high) if is_allowed else (low, middle)
    points = curve.sparsities
    losses = np.stack([curve.losses(sparsity).numpy() for sparsity in points], axis=1)

    def crossing(weights: Array) -> Array:
        means = weights @ losses
        return np.array([_last_crossing(points, row / row[0] - 1) for row in means])

    return Essential(bootstrap(crossing, len(losses), seed=seed).at(), knee(GRID, increases))


def relative_increase(losses: Tensor, dense: Tensor) -> float:
    """ΔL/L.

    Args:
        losses: of each sequence, [sequences].
        dense: the same of the model as it is.
    """
    return float(losses.mean()) / float(dense.mean()) - 1


def knee(x: tuple[float, ...], y: list[float]) -> float:
    """Where a rising curve lies farthest below the line between its ends.

    Source: Satopää et al., Finding a "Kneedle" in a Haystack (2011).

    Args:
        x: ascending, at least two.
        y: as many.
    """
    across, up = np.asarray(x), np.asarray(y)
    line = up[0] + (up[-1] - up[0]) * (across - across[0]) / (across[-1] - across[0])
    return float(across[np.argmax(line - up)])


def _last_crossing(points: list[float], increases: Array) -> float:
    """The sparsity at which the increase passes the allowance for good, linear between points."""
    last = int(np.flatnonzero(increases <= INCREASE_ALLOWED)[-1])
    if last + 1 == len(points):
        return points[-1]
    share = (INCREASE_ALLOWED - increases[last]) / (increases[last + 1] - increases[last])
    return points[last] + float(share) * (points[last + 1] - points[last])
