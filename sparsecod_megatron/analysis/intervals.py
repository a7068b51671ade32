"""How sure a number is: bootstrap over sequences, and Wilson's interval of a share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Strata = npt.NDArray[np.int64] | None
NUM_RESAMPLES = 1000
RESAMPLES_AT_ONCE = 50
Z_95 = 1.959963984540054
"""The normal distribution's 97.5 % point."""


class Interval(NamedTuple):
    """A number with the ends of its 95 % interval; they are None where one sequence says nothing about the spread."""

    value: float | None
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return {"value": self.value, "low": self.low, "high": self.high}

    def contains(self, value: float) -> bool:
        """Whether the interval leaves `value` possible; without an interval everything is."""
        return self.low is None or self.high is None or self.low <= value <= self.high


@dataclass(frozen=True)
class Estimate:
    """Many numbers with their intervals.

    Attributes:
        value: [...]; NaN where undefined, as in `low` and `high`.
        low: [...] lower ends; NaN for a sample of one sequence.
        high: [...] upper ends.
    """

    value: Array
    low: Array
    high: Array

    def at(self, *index: int) -> Interval:
        """One of them."""
        return Interval(finite(self.value[index]), finite(self.low[index]), finite(self.high[index]))


def finite(value: float) -> float | None:
    """A float for JSON: None where it is non-finite."""
    return float(value) if math.isfinite(value) else None


def bootstrap(
    statistic: Callable[[Array], Array],
    num_sequences: int,
    *,
    seed: int,
    num_resamples: int = NUM_RESAMPLES,
    strata: Strata = None,
) -> Estimate:
    """A statistic of weighted sequences with its percentile interval when sequences are drawn with replacement.

    Args:
        statistic: from weights [resamples, sequences], how often each sequence counts, to values [resamples, ...].
        num_sequences: sequences of the sample.
        seed: seed of the draws; the same seed draws the same sequences for every statistic, so differences are paired.
        num_resamples: draws; fewer for a statistic that is costly.
        strata: a number for each sequence; as many of each are drawn as there are. None draws from all alike.
    """
    value = statistic(np.ones((1, num_sequences)))[0]
    if num_sequences < 2:
        return Estimate(value, np.full_like(value, np.nan), np.full_like(value, np.nan))
    draws, generator = np.zeros((num_resamples, num_sequences)), np.random.default_rng(seed)
    of = np.zeros(num_sequences, dtype=np.int64) if strata is None else strata
    for stratum in np.unique(of):
        members = np.flatnonzero(of == stratum)
        shares = np.full(len(members), 1 / len(members))
        draws[:, members] = generator.multinomial(len(members), shares, size=num_resamples)
    parts = np.split(draws, range(RESAMPLES_AT_ONCE, num_resamples, RESAMPLES_AT_ONCE))
    resampled = np.concatenate([statistic(part) for part in parts])
    # A resample in which the number is undefined makes its ends undefined, rather than a warning of numpy's.
    with np.errstate(invalid="ignore"):
        low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return Estimate(value, np.asarray(low), np.asarray(high))


def ratio_of_sums(numerator: Array, denominator: Array, *, seed: int, strata: Strata = None) -> Estimate:
    """Σ numerator ÷ Σ denominator over sequences.

    Args:
        numerator: [sequences, ...].
        denominator: [sequences, ...], the same shape or one that broadcasts to it.
        seed: seed of the bootstrap.
        strata: as of `bootstrap`.

    Returns:
        [...]; NaN where the denominator is zero.
    """

    def statistic(weights: Array) -> Array:
        above, below = (_weighted_sums(weights, part) for part in (numerator, denominator))
        with np.errstate(divide="ignore", invalid="ignore"):
            quotient = above / below
        return np.where(np.isfinite(quotient), quotient, np.nan)

    return bootstrap(statistic, len(numerator), seed=seed, strata=strata)


def mean_interval(values: Array, *, seed: int) -> Estimate:
    """The mean over sequences of `values` [sequences, ...]."""
    return ratio_of_sums(values, np.ones((len(values),) + (1,) * (values.ndim - 1)), seed=seed)


def wilson(successes: int, trials: int) -> Interval:
    """A share with Wilson's 95 % score interval.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.

    Args:
        successes: number among `trials`.
        trials: at least one.
    """
    share = successes / trials
    spread = 1 + Z_95**2 / trials
    middle = (share + Z_95**2 / (2 * trials)) / spread
    half = Z_95 / spread * math.sqrt(share * (1 - share) / trials + Z_95**2 / (4 * trials**2))
    # The ends that are exact by definition are not left to rounding.
    return Interval(share, middle - half if successes else 0.0, middle + half if successes < trials else 1.0)


def _weighted_sums(weights: Array, values: Array) -> Array:
    """[resamples, sequences] and [sequences, ...] → [resamples, ...]."""
    flat = weights @ values.reshape(len(values), -1)
    return flat.reshape(len(weights), *values.shape[1:])
