"""Samples of pairs of blocks: spread over all distances, unbiased, and with an interval that holds the truth."""

from __future__ import annotations

import numpy as np
import pytest

from sparsecod_megatron.analysis.scores.pairs import choose_pairs
from sparsecod_megatron.analysis.scores.permutation import Permutation
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.errors import ConfigError
from tests.unit.analysis.scores.families import context, tiny


def test_adjacent_pairs_are_those_of_the_whole_table() -> None:
    sample = context(tiny("llama", num_hidden_layers=4))
    whole, adjacent = Permutation().run(sample), Permutation(pairs="adjacent").run(sample)
    neighbours = [row for row in whole.tables["permutation"] if row["second"] == row["first"] + 1]
    assert adjacent.tables["permutation"] == neighbours and len(neighbours) == 3
    mean = np.mean([row["permutation"] for row in neighbours])
    assert adjacent.values["permutation_adjacent"]["value"] == pytest.approx(mean)
    assert "permutation" not in adjacent.values  # another number than the mean over all pairs


def test_a_sample_of_pairs_gives_rows_of_the_whole_table_and_a_wider_interval() -> None:
    sample = context(tiny("llama", num_hidden_layers=5))
    whole, part = Permutation().run(sample), Permutation(pairs=4).run(sample)
    rows = {(row["first"], row["second"]): row["permutation"] for row in whole.tables["permutation"]}
    assert len(rows) == 10 and part.values["pairs"] == len(part.tables["permutation"]) == 4
    for row in part.tables["permutation"]:
        assert row["permutation"] == pytest.approx(rows[row["first"], row["second"]], abs=1e-9)
    found = part.values["permutation"]
    assert found["low"] < whole.values["permutation"]["value"] < found["high"]
    assert any("4 of 10 pairs" in warning for warning in part.warnings)
    assert Permutation(pairs=99).run(sample).values == whole.values


def test_the_interval_holds_the_mean_over_all_pairs() -> None:
    layers = np.random.default_rng(1).gamma(1.0, size=30)
    everything = choose_pairs(30, None, seed=0).swaps

    def cost(pairs: list[tuple[int, int]]) -> np.ndarray:
        return np.array([0.1 * (j - i) ** 1.5 + layers[i] + layers[j] for i, j in pairs])

    truth, held, means = cost(everything).mean(), 0, []
    for seed in range(200):
        chosen = choose_pairs(30, 60, seed=seed)
        assert len(set(chosen.swaps)) == 60 and chosen.weights.sum() == pytest.approx(1)
        values = cost(chosen.swaps)
        means.append(values @ chosen.weights)
        held += abs(means[-1] - truth) <= 1.96 * chosen.sampling_variance(values) ** 0.5
    assert np.mean(means) == pytest.approx(truth, rel=0.01)
    assert held >= 0.9 * 200
    assert np.std(means) < 0.5 * cost(everything).std() / 60**0.5  # what strata gain over drawing at random


@pytest.mark.parametrize("text", ["1", "0", "-3", "x", "2.5"])
def test_pairs_that_are_no_number_are_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--pairs {text}: give a number"):
        find_scores(["permutation"], pairs=text)


def test_pairs_without_permutation_are_refused() -> None:
    with pytest.raises(ConfigError, match="--pairs 9: only permutation"):
        find_scores(["causal"], pairs="9")
