"""Differences of models: errors over pairs where there are any, against the textbook and resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sparsecod_megatron.evaluation.harness import HarnessResult, TaskMetric
from sparsecod_megatron.evaluation.perplexity import ScoredWindows, summary
from sparsecod_megatron.evaluation.result import Difference, ModelResult, differences


def scored(model: str, sums: np.ndarray, counts: np.ndarray) -> ModelResult:
    windows = ScoredWindows(sums, counts, seq_length=8, stride=8)
    return ModelResult(model, summary(windows, num_bytes=400), windows)


def test_perplexity_on_the_same_windows() -> None:
    """Windows that are hard for both: resampled together, the difference varies as the formula says, far below each."""
    generator = np.random.default_rng(0)
    counts = np.full(200, 8.0)
    counts[-1] = 5
    hardness = generator.normal(2, 1, 200)
    first = scored("a", hardness * counts, counts)
    other = scored("b", (hardness + generator.normal(0.05, 0.1, 200)) * counts, counts)
    found = {difference.metric: difference for difference in differences(first, other)}
    drawn = generator.integers(200, size=(2000, 200))
    losses = [result.windows.sums[drawn].sum(1) / counts[drawn].sum(1) for result in (first, other) if result.windows]
    for metric, moved in (("loss", losses[1] - losses[0]), ("perplexity", np.exp(losses[1]) - np.exp(losses[0]))):
        assert found[metric].paired
        assert found[metric].stderr == pytest.approx(moved.std(ddof=1), rel=0.1)
    loss = found["loss"].stderr
    assert loss is not None and first.perplexity is not None and first.perplexity.loss_stderr is not None
    assert loss < 0.2 * first.perplexity.loss_stderr
    assert found["bits_per_byte"].stderr == pytest.approx(loss * counts.sum() / 400 / math.log(2))
    assert found["loss"].mark == "**"


def test_perplexity_on_other_windows_takes_both_errors() -> None:
    generator = np.random.default_rng(0)
    first, other = (scored(str(size), generator.normal(16, 4, size), np.full(size, 8.0)) for size in (100, 120))
    found = {difference.metric: difference for difference in differences(first, other)}
    ours, theirs = (result.metrics[0].stderr for result in (first, other))
    assert ours is not None and theirs is not None
    assert not found["loss"].paired and found["loss"].stderr == pytest.approx(math.hypot(ours, theirs))


def group(model: str, first: list[float], second: list[float], *, weighted: bool) -> ModelResult:
    answers = {("one", "acc"): first, ("two", "acc"): second}
    pooled = float(np.mean(first + second) if weighted else (np.mean(first) + np.mean(second)) / 2)
    row = TaskMetric("both", "acc", pooled, 0.1, len(first + second))
    return ModelResult(model, tasks=HarnessResult([row], {"group_subtasks": {"both": ["one", "two"]}}, 0, answers))


def test_group_is_paired_where_it_is_the_mean_of_its_questions() -> None:
    ours, theirs = ([1.0, 0.0, 0.0], [1.0]), ([1.0, 1.0, 0.0], [0.0])
    [difference] = differences(group("a", *ours, weighted=True), group("b", *theirs, weighted=True))
    assert (difference.value, difference.paired) == (0, True)
    assert difference.stderr == pytest.approx(np.std([0, 1, 0, -1], ddof=1) / 2)
    [difference] = differences(group("a", *ours, weighted=False), group("b", *theirs, weighted=False))
    assert not difference.paired and difference.stderr == pytest.approx(0.1 * math.sqrt(2))


def test_one_question_and_no_error_have_no_mark() -> None:
    rows = [
        ModelResult("m", tasks=HarnessResult([TaskMetric("t", "acc", value, None, 1)], {}, 0, {("t", "acc"): [value]}))
        for value in (0.0, 1.0)
    ]
    [difference] = differences(*rows)
    assert (difference.value, difference.stderr, difference.mark) == (1, None, "")


@pytest.mark.parametrize(("value", "mark"), [(0.9, ""), (1.1, "*"), (-1.9, "*"), (-2.1, "**")])
def test_marks(value: float, mark: str) -> None:
    assert Difference("m", "t", "acc", value, 1.0, paired=False).mark == mark
