"""Intervals against scipy and against what is known exactly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparsecod_megatron.analysis.intervals import bootstrap, mean_interval, ratio_of_sums, wilson


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts: tuple[int, int]) -> None:
    successes, trials = counts
    expected = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    value, low, high = wilson(successes, trials)
    assert value == successes / trials
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_bootstrap_of_a_mean_is_the_normal_interval() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, size=(400, 3))
    estimate = mean_interval(values, seed=1)
    assert estimate.value == pytest.approx(values.mean(axis=0))
    half = 1.96 * values.std(axis=0, ddof=1) / 20
    assert estimate.low == pytest.approx(values.mean(axis=0) - half, abs=0.04)
    assert estimate.high == pytest.approx(values.mean(axis=0) + half, abs=0.04)


def test_ratio_weighs_sequences_by_their_denominator() -> None:
    estimate = ratio_of_sums(np.array([1.0, 30.0]), np.array([1.0, 10.0]), seed=0)
    assert estimate.at().value == pytest.approx(31 / 11)
    assert (estimate.at().low, estimate.at().high) == (1.0, 3.0)  # one sequence drawn twice, or the other


def test_zero_denominators_are_undefined_not_numbers() -> None:
    estimate = ratio_of_sums(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[2.0, 0.0], [2.0, 0.0]]), seed=0)
    assert estimate.at(0).value == 0.5
    assert estimate.at(1) == (None, None, None)


def test_one_sequence_has_no_interval() -> None:
    assert mean_interval(np.array([2.0]), seed=0).at() == (2.0, None, None)


def test_same_seed_same_draws_and_chunks_do_not_matter() -> None:
    values = np.arange(7.0)
    calls: list[int] = []

    def statistic(weights: np.ndarray) -> np.ndarray:
        calls.append(len(weights))
        return weights @ values

    first, second = (bootstrap(statistic, 7, seed=4, num_resamples=120) for _ in range(2))
    assert (first.low, first.high) == (second.low, second.high)
    assert calls[:4] == [1, 50, 50, 20]


def test_strata_keep_their_numbers() -> None:
    """Of two kinds with one value each nothing is left to chance; drawn from all alike, their shares are."""
    values, strata = np.repeat([0.0, 1.0], [4, 12]), np.repeat([0, 1], [4, 12])
    whole = mean_interval(values, seed=1).at()
    assert whole.low is not None and whole.low < 0.7 < 0.8 < (whole.high or 0)
    kept = ratio_of_sums(values, np.ones(16), seed=1, strata=strata).at()
    assert (kept.value, kept.low, kept.high) == (0.75, 0.75, 0.75)
    mixed = ratio_of_sums(np.arange(16.0), np.ones(16), seed=1, strata=strata)
    spread = np.sqrt(4 * np.var(range(4)) + 12 * np.var(range(12))) / 16
    assert float(mixed.high - mixed.low) == pytest.approx(2 * 1.96 * spread, rel=0.1)
