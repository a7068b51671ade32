"""Means, slopes and verdicts, against scipy and numpy, and on results whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.studies.claims import NOT_MEASURED, NOT_SEPARABLE, REFUTED, SUPPORTED, Results, judge
from sparsecod_megatron.studies.intervals import mean_over_seeds, slope
from sparsecod_megatron.studies.schema import ClaimConfig

VALUES = st.floats(-1e6, 1e6)


@given(st.lists(VALUES, min_size=2, max_size=60))
def test_the_interval_is_students(values: list[float]) -> None:
    mean = mean_over_seeds(values)
    expected, error = np.mean(values), scipy.stats.sem(values)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * error
    assert mean.value == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert mean.low is not None and mean.high is not None
    assert (mean.high - mean.low) / 2 == pytest.approx(half, rel=2e-4, abs=1e-6)
    assert mean.count == len(values)


def test_one_seed_has_no_interval() -> None:
    assert mean_over_seeds([3.0]).low is None


@given(st.lists(VALUES, min_size=2, max_size=9))
def test_the_slope_is_the_least_squares_line(values: list[float]) -> None:
    expected = np.polyfit(range(len(values)), values, 1)[0]
    assert slope(values) == pytest.approx(expected, rel=1e-6, abs=1e-4)


def results(of_place: dict[str, list[float]]) -> Results:
    """One axis `x`; seeds from 1 on."""
    return {
        (("x", label),): {seed: {"m": value} for seed, value in enumerate(values, start=1)}
        for label, values in of_place.items()
    }


HIGHER = ClaimConfig(text="b above a", metric="m", higher={"x": "b"}, lower={"x": "a"})
FALLS = ClaimConfig(text="falls", metric="m", falls_along="x")


@pytest.mark.parametrize(
    ("claim", "values", "verdict"),
    [
        # Seeds differ by more than the places do, but each seed agrees: only pairing tells.
        (HIGHER, {"a": [1.0, 5.0, 9.0], "b": [1.5, 5.6, 9.4]}, SUPPORTED),
        (HIGHER, {"a": [1.5, 5.6, 9.4], "b": [1.0, 5.0, 9.0]}, REFUTED),
        (HIGHER, {"a": [1.0, 2.0, 3.0], "b": [3.0, 2.0, 1.1]}, NOT_SEPARABLE),
        (HIGHER, {"a": [1.0], "b": [9.0]}, NOT_SEPARABLE),  # a single seed proves nothing
        (HIGHER, {"a": [1.0, 1.0], "b": []}, NOT_MEASURED),
        (FALLS, {"a": [3.0, 3.3], "b": [2.0, 2.2], "c": [1.0, 1.1]}, SUPPORTED),
        (FALLS, {"a": [1.0, 1.1], "b": [2.0, 2.2], "c": [3.0, 3.3]}, REFUTED),
    ],
)
def test_verdicts(claim: ClaimConfig, values: dict[str, list[float]], verdict: str) -> None:
    assert judge(claim, results(values)).verdict == verdict


def test_other_axes_are_averaged_over() -> None:
    cells = {
        (("x", x), ("y", y)): {seed: {"m": base + shift + 0.01 * seed * (x == "b")} for seed in (1, 2, 3)}
        for x, base in (("a", 0.0), ("b", 1.0))
        for y, shift in (("low", 0.0), ("high", 10.0))
    }
    verdict = judge(HIGHER, cells)
    assert verdict.verdict == SUPPORTED and verdict.difference is not None
    assert verdict.difference.value == pytest.approx(1.02)


def test_a_seed_that_diverged_at_one_place_is_left_out() -> None:
    found = dict(results({"a": [1.0, 2.0, 3.0], "b": [2.0, 3.1, 4.0]}))
    found[(("x", "b"),)] = {**found[(("x", "b"),)], 2: {}}
    difference = judge(HIGHER, found).difference
    assert difference is not None and difference.count == 2 and math.isclose(difference.value, 1.0)
