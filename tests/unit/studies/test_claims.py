"""Means, slopes and verdicts, against scipy and numpy, and on results whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.studies.claims import NOT_MEASURED, NOT_SEPARABLE, REFUTED, SUPPORTED, Results, judge, judge_all
from sparsecod_megatron.studies.intervals import mean_over_seeds, p_value, seeds_to_separate, slope
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


@pytest.mark.parametrize("count", range(2, 13))
def test_the_probability_is_students(count: int) -> None:
    """For odd and even degrees of freedom, and what separates by the one separates by the other."""
    for shift in (0.0, 0.3, 1.0, 5.0):
        values = np.random.default_rng(count).standard_normal(count) + shift
        mean = mean_over_seeds(list(values))
        value, expected = p_value(mean), scipy.stats.ttest_1samp(values, 0).pvalue
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert mean.low is not None and mean.high is not None and value is not None
        assert (value < 0.05) == (not mean.low <= 0 <= mean.high)


def test_probability_without_spread() -> None:
    assert p_value(mean_over_seeds([2.0, 2.0])) == 0
    assert p_value(mean_over_seeds([0.0, 0.0])) == 1
    assert p_value(mean_over_seeds([2.0])) is None


@pytest.mark.parametrize(("mean", "deviation"), [(0.2, 1.0), (-0.05, 0.3), (0.5, 0.4), (3.0, 0.1)])
def test_seeds_that_would_do_are_the_fewest_whose_interval_leaves_zero_out(mean: float, deviation: float) -> None:
    three = mean_over_seeds([mean - deviation, mean, mean + deviation])  # whose standard deviation that is
    needed = seeds_to_separate(three)
    assert needed is not None

    def separates(count: int) -> bool:
        return bool(scipy.stats.t.ppf(0.975, count - 1) * deviation / math.sqrt(count) < abs(mean))

    assert separates(needed) and (needed == 2 or not separates(needed - 1))


def test_no_number_of_seeds_finds_a_difference_that_is_not_there() -> None:
    assert seeds_to_separate(mean_over_seeds([-1.0, 0.0, 1.0])) is None
    assert seeds_to_separate(mean_over_seeds([2.0])) is None
    claim = ClaimConfig("b is above a", "m", higher={"x": "b"}, lower={"x": "a"})
    assert judge(claim, results({"a": [0, 0, 0], "b": [0.5, -0.2, 1.0]})).seeds_needed == 10
    assert judge(claim, results({"a": [0, 0, 0], "b": [0.9, 1.0, 1.1]})).seeds_needed is None


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


def test_holm_corrects_for_claims_that_could_be_tested() -> None:
    """By the definition: the smallest p times the number of claims, the next times one less, never falling."""
    random = np.random.default_rng(10)
    shifts = {"b": 3.0, "c": 1.0, "d": 0.8, "e": 0.0}
    base = list(random.standard_normal(5))
    places = {
        label: [value + shift + 0.4 * random.standard_normal() for value in base] for label, shift in shifts.items()
    }
    cells = results({"a": base, **places, "one": [9.0], "none": []})
    claims = [
        ClaimConfig(text=label, metric="m", higher={"x": label}, lower={"x": "a"}) for label in ("one", *shifts, "none")
    ]
    verdicts = judge_all(claims, cells)
    single, none = verdicts[0], verdicts[-1]
    assert (single.verdict_holm, single.p_holm) == (NOT_SEPARABLE, None)
    assert (none.verdict_holm, none.p_holm) == (NOT_MEASURED, None)
    tested = sorted(verdicts[1:-1], key=lambda verdict: verdict.p_value or 0.0)
    raw = [verdict.p_value for verdict in tested]
    expected = np.maximum.accumulate([min(value * (4 - rank), 1) for rank, value in enumerate(raw)])  # type: ignore[operator]
    assert [verdict.p_holm for verdict in tested] == pytest.approx(list(expected))
    for verdict in tested:
        assert verdict.p_holm is not None
        assert verdict.verdict_holm == (verdict.verdict if verdict.p_holm < 0.05 else NOT_SEPARABLE)
    plain = [verdict.verdict for verdict in tested]
    assert plain.count(SUPPORTED) > [verdict.verdict_holm for verdict in tested].count(SUPPORTED) >= 1


def test_a_single_claim_needs_no_correction() -> None:
    cells = results({"a": [1.0, 5.0, 9.0], "b": [1.5, 5.6, 9.4]})
    assert judge_all([HIGHER], cells) == [judge(HIGHER, cells)]
    assert judge(HIGHER, cells).verdict_holm == SUPPORTED
