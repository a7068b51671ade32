"""Thinning of long series: what must stay, whatever the data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparsecod_megatron.analysis.report.decimate import evenly_spaced, kept_points

Values = npt.NDArray[np.float64]
# Broken values included: a diverged run has them, and they must not be taken for extremes.
numbers = st.floats(-1e6, 1e6) | st.sampled_from([np.nan, np.inf, -np.inf])
bundles = st.tuples(st.integers(1, 120), st.integers(1, 4)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=numbers)
)


@given(values=bundles, limit=st.integers(2, 60))
def test_ends_and_every_series_extremes_stay(values: Values, limit: int) -> None:
    kept = kept_points(values, limit)
    points, series = values.shape
    assert np.all(np.diff(kept) > 0)
    assert kept[0] == 0 and kept[-1] == points - 1
    assert len(kept) <= max(limit, 2 * series + 2)
    for column in values.T:
        finite = column[np.isfinite(column)]
        if len(finite):
            assert {finite.min(), finite.max()} <= set(column[kept].tolist())


@given(values=bundles)
def test_short_series_stay_whole(values: Values) -> None:
    np.testing.assert_array_equal(kept_points(values, len(values)), np.arange(len(values)))


@given(st.integers(0, 9), st.lists(st.integers(10, 9_980), min_size=1, max_size=20, unique=True), st.booleans())
def test_every_spike_of_a_long_run_stays(layer: int, spikes: list[int], upwards: bool) -> None:
    """A spike or a drop in one layer of ten survives, unless a larger one shares its stretch of 10,000 ÷ 289 points."""
    values = np.repeat(np.linspace(1.0, 50.0, 10_000)[:, None], 10, axis=1)
    values[spikes, layer] *= np.linspace(2, 3, len(spikes)) ** (1 if upwards else -1)
    kept = kept_points(values, 600)
    assert len(kept) <= 600
    for spike in spikes:
        near = [other for other in spikes if abs(other - spike) < 40]
        assert set(near) & set(kept.tolist())


@given(points=st.integers(1, 500), limit=st.integers(2, 100))
def test_even_spacing(points: int, limit: int) -> None:
    kept = evenly_spaced(points, limit)
    assert len(kept) == min(points, limit)
    assert kept[0] == 0 and kept[-1] == points - 1
    gaps = np.diff(kept)
    assert points == 1 or gaps.max() - gaps.min() <= 1
