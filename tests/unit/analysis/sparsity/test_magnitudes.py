"""Hoyer, Gini and shares against their formulas; the exact quantile against a full sort; W₁ against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.analysis.sparsity.magnitudes import gini, hoyer, share_below
from sparsecod_megatron.analysis.sparsity.quantiles import kth_magnitudes
from sparsecod_megatron.analysis.sparsity.wasserstein import distance_to_normal

VALUES = st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=40)


@given(VALUES)
def test_gini_is_the_mean_absolute_difference(values: list[float]) -> None:
    weight = torch.tensor(values)
    magnitudes = np.abs(weight.double().numpy())
    mean = magnitudes.mean()
    expected = 1.0 if mean == 0 else np.abs(magnitudes[:, None] - magnitudes).mean() / (2 * mean)
    assert gini(weight) == pytest.approx(expected, abs=1e-6)


def test_measures_of_known_tensors() -> None:
    single = torch.zeros(3, 7)
    single[1, 2] = -5.0
    assert hoyer(single) == pytest.approx(1)
    assert gini(single) == pytest.approx(1 - 1 / 21)
    flat = torch.full((40,), -0.3)
    assert hoyer(flat) == pytest.approx(0, abs=1e-6)
    assert gini(flat) == pytest.approx(0, abs=1e-6)
    assert hoyer(torch.zeros(5)) == gini(torch.zeros(5)) == 1
    normal = torch.randn(2_000_000, generator=torch.Generator().manual_seed(0))
    assert hoyer(normal) == pytest.approx(1 - math.sqrt(2 / math.pi), abs=2e-3)
    assert gini(normal) == pytest.approx(math.sqrt(2) - 1, abs=1e-3)
    for epsilon in (0.01, 0.5):
        assert share_below(normal, epsilon) == pytest.approx(math.erf(epsilon / math.sqrt(2)), abs=1e-3)


def test_scaling_moves_the_fixed_threshold_only() -> None:
    weight = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    assert share_below(0.1 * weight, 0.01) > 5 * share_below(weight, 0.01)
    assert hoyer(0.1 * weight) == pytest.approx(hoyer(weight), abs=1e-6)
    assert gini(0.1 * weight) == pytest.approx(gini(weight), abs=1e-6)


@given(st.lists(VALUES, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_kth_magnitude_is_that_of_a_full_sort(tensors: list[list[float]], random: object) -> None:
    ordered = np.sort(np.abs(np.concatenate([np.array(values, np.float32) for values in tensors])))
    ks = sorted({1, len(ordered), random.randint(1, len(ordered)), random.randint(1, len(ordered))})  # type: ignore[attr-defined]
    found = kth_magnitudes([torch.tensor(values) for values in tensors], [0, *ks])
    assert found == [-1.0, *(float(ordered[k - 1]) for k in ks)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kth_magnitude_spans_many_tensors_and_exponents(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(37, 211, generator=generator).mul(scale).to(dtype) for scale in (1e-3, 1.0, 30.0)]
    ordered = torch.cat([tensor.flatten().float().abs() for tensor in tensors]).sort().values
    ks = [1, 1000, 12345, len(ordered)]
    assert kth_magnitudes(tensors, ks) == [float(ordered[k - 1]) for k in ks]


def test_distance_of_three_known_distributions() -> None:
    n = 40_000
    middle = (np.arange(n) + 0.5) / n
    modes = np.concatenate([scipy.stats.norm.ppf(middle, -3), scipy.stats.norm.ppf(middle, 3)])
    distances = [
        float(distance_to_normal(torch.tensor(values)[:, None]))
        for values in (7 + 3 * scipy.stats.norm.ppf(middle), scipy.stats.laplace.ppf(middle), modes)
    ]
    assert distances == pytest.approx([0.0, 0.14, 0.30], abs=0.01)
    rng = np.random.default_rng(0)
    reference = scipy.stats.norm.ppf((np.arange(10 * n) + 0.5) / (10 * n))
    for values, found in zip((scipy.stats.laplace.ppf(middle), modes), distances[1:], strict=True):
        standard = (values - values.mean()) / values.std()
        assert found == pytest.approx(scipy.stats.wasserstein_distance(rng.permutation(standard), reference), abs=1e-4)


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=30).filter(lambda values: np.std(values) > 1e-3))
def test_distance_is_the_integral_between_quantile_functions(values: list[float]) -> None:
    x = np.sort((np.array(values) - np.mean(values)) / np.std(values))
    u = (np.arange(200_000) + 0.5) / 200_000
    expected = np.abs(x[np.minimum((u * len(x)).astype(int), len(x) - 1)] - scipy.stats.norm.ppf(u)).mean()
    found = distance_to_normal(torch.tensor(values, dtype=torch.float64)[:, None])
    assert float(found) == pytest.approx(expected, abs=1e-3)


def test_distance_of_a_constant_neuron_is_undefined() -> None:
    columns = torch.stack([torch.ones(9), torch.arange(9.0)], 1)
    assert distance_to_normal(columns).isnan().tolist() == [True, False]
