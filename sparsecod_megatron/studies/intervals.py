"""Means over seeds with Student's 95 % interval: what a few runs of one place say about the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparsecod_megatron.analysis.intervals import Z_95

T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)
"""The 97.5 % points of Student's t for 1, 2, … degrees of freedom."""
MOST_SEEDS = 1000
"""Beyond which a difference is called too small to look for."""


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
    """The mean of one number per seed, with the interval that Student's t gives it."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Mean(mean, None, None, count)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    half = t_95(count - 1) * math.sqrt(variance / count)
    return Mean(mean, mean - half, mean + half, count)


def t_95(freedom: int) -> float:
    """The 97.5 % point of Student's t, by its expansion around the normal's where the table ends.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
    """
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = Z_95
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def p_value(mean: Mean) -> float | None:
    """Probability of a mean at least this far from zero if the true one is zero, by Student's t; None of a single seed.

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4, exact for whole degrees.
    """
    if mean.low is None or mean.high is None:
        return None
    freedom, error = mean.count - 1, _standard_error(mean.low, mean.high, mean.count)
    if error == 0:
        return 1.0 if mean.value == 0 else 0.0
    angle = math.atan(abs(mean.value) / error / math.sqrt(freedom))
    # 1 + 1/2 cos² θ (1 + 3/4 cos² θ (…)) for even degrees of freedom, 1 + 2/3 cos² θ (1 + 4/5 cos² θ (…)) for odd ones.
    series = 1.0
    for number in range(freedom - 3, 0, -2):
        series = 1 + series * math.cos(angle) ** 2 * number / (number + 1)
    if freedom % 2 == 0:
        return max(1 - math.sin(angle) * series, 0.0)
    beyond = math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0.0
    return max(1 - 2 / math.pi * (angle + beyond), 0.0)


def seeds_to_separate(mean: Mean) -> int | None:
    """Seeds with which the interval would leave out zero, if mean and spread stayed; None if a thousand would not do.

    Args:
        mean: over two seeds or more.
    """
    if mean.low is None or mean.high is None:
        return None
    deviation = _standard_error(mean.low, mean.high, mean.count) * math.sqrt(mean.count)
    counts = range(2, MOST_SEEDS + 1)
    return next((count for count in counts if t_95(count - 1) * deviation < abs(mean.value) * math.sqrt(count)), None)


def _standard_error(low: float, high: float, count: int) -> float:
    """The mean's, from its 95 % interval."""
    return (high - low) / 2 / t_95(count - 1)


def slope(values: Sequence[float]) -> float:
    """Least-squares change of the values from one place to the next."""
    middle = (len(values) - 1) / 2
    mean = math.fsum(values) / len(values)
    above = math.fsum((place - middle) * (value - mean) for place, value in enumerate(values))
    return above / math.fsum((place - middle) ** 2 for place in range(len(values)))
