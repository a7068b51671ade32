"""Means over seeds with Student's 95 % interval: what a few runs of one place say of the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsecod_megatron.analysis.intervals import Z_95

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""The 97.5 % points of Student's t for 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """A mean over seeds.

    Attributes:
        value: the mean.
        low: lower end of its 95 % interval, None of a single seed.
        high: its upper end.
        count: seeds.
    """

    value: float
    low: float | None
    high: float | None
    count: int


def mean_over_seeds(values: Sequence[float]) -> Mean:
    """The mean of one number a seed, with the interval that Student's t gives it."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Mean(mean, None, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    point = T_95[count - 2] if count - 2 < len(T_95) else Z_95
    half = point * math.sqrt(variance / count)
    return Mean(mean, mean - half, mean + half, count)


def slope(values: Sequence[float]) -> float:
    """Least-squares change of the values from one place to the next."""
    middle = (len(values) - 1) / 2
    mean = math.fsum(values) / len(values)
    above = math.fsum((place - middle) * (value - mean) for place, value in enumerate(values))
    return above / math.fsum((place - middle) ** 2 for place in range(len(values)))
