"""The monitor against numpy, over streams with spikes, level shifts and interruptions."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.backend import select_backend

select_backend()
from sparsecod_megatron.train.spikes import SpikeMonitor, deviation  # noqa: E402 - Megatron-Core comes after the backend

FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


def monitor(window: int = 8, threshold: float = 6.0) -> SpikeMonitor:
    return SpikeMonitor(("loss",), window=window, threshold=threshold)


def seen(watch: SpikeMonitor, values: list[float]) -> list[bool]:
    return [watch.observe({"loss": value}) for value in values]


@given(history=st.lists(FINITE, min_size=1, max_size=40), value=FINITE)
def test_deviation_is_numpys(history: list[float], value: float) -> None:
    median = np.median(history)
    spread = max(1.4826 * np.median(np.abs(np.array(history) - median)), 1e-3 * abs(median))
    if spread > 1e-300:
        assert deviation(value, history) == pytest.approx((value - median) / spread, rel=1e-9, abs=1e-9)


def test_values_without_any_spread() -> None:
    assert deviation(0.0, [0.0] * 8) == 0.0
    assert deviation(1e-30, [0.0] * 8) == math.inf


def noisy(count: int, level: float = 3.0, seed: int = 0) -> list[float]:
    return (level + 0.05 * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_a_spike_is_found_and_a_fall_is_none() -> None:
    assert seen(monitor(16), [*noisy(16), 4.0, 3.0, 2.0, 3.0]) == [False] * 16 + [True, False, False, False]


def test_nothing_before_the_window_is_full() -> None:
    assert not any(seen(monitor(16), [*noisy(15), 400.0]))


def test_a_new_level_becomes_normal() -> None:
    """Half a window of it, as the median wants."""
    found = seen(monitor(16), [*noisy(16), *noisy(40, level=4.0, seed=1)])
    assert found[16:20] == [True] * 4 and not any(found[25:])


def test_any_watched_value_counts() -> None:
    watch = SpikeMonitor(("loss", "grad_norm"), window=8, threshold=6.0)
    for loss, norm in zip(noisy(8), noisy(8, seed=1), strict=True):
        assert not watch.observe({"loss": loss, "grad_norm": norm})
    assert watch.observe({"loss": 3.0, "grad_norm": 30.0})


def test_no_window_finds_nothing() -> None:
    assert not any(seen(monitor(0), [1.0, 1e9, math.pi]))


@given(values=st.lists(FINITE, min_size=2, max_size=60), cut=st.integers(0, 60), window=st.integers(1, 12))
def test_interrupted_is_uninterrupted(values: list[float], cut: int, window: int) -> None:
    """Through JSON, as state.json keeps it: the same spikes, and the same bits left behind."""
    straight, first, second = monitor(window, 2.0), monitor(window, 2.0), monitor(window, 2.0)
    expected = seen(straight, values)
    found = seen(first, values[:cut])
    second.restore(json.loads(json.dumps(first.state())))
    assert found + seen(second, values[cut:]) == expected
    assert second.state() == straight.state()
