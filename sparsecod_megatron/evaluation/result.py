"""What was measured of one model, as rows of a table, and how two models' rows differ.

Where both models answered the same questions, or were scored on the same windows of text, the difference has a standard
error of its own, over the differences of single questions. It is usually far below the two models' errors taken
together, because both find the same questions hard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from sparsecod_megatron.evaluation.harness import HarnessResult, TaskMetric
from sparsecod_megatron.evaluation.perplexity import PerplexityResult, ScoredWindows

TEXT_ROW = "held-out text"
"""In place of a task in the rows of perplexity."""
MEAN_TOLERANCE = 1e-9
"""By how much a metric may miss the mean of its questions and still be that mean."""


@dataclass(frozen=True)
class ModelResult:
    """What was measured of one model.

    Attributes:
        model: as the user named it.
        perplexity: None where it was not asked for.
        windows: what `perplexity` was summed up from, None without it.
        tasks: None where none was asked for.
    """

    model: str
    perplexity: PerplexityResult | None = None
    windows: ScoredWindows | None = None
    tasks: HarnessResult | None = None

    @property
    def metrics(self) -> list[TaskMetric]:
        """All rows: loss, perplexity and bits per byte, then every task's."""
        return [*_perplexity_metrics(self.perplexity), *(self.tasks.metrics if self.tasks else [])]


@dataclass(frozen=True)
class Difference:
    """How far a model's metric is from the first model's.

    Attributes:
        model: the model.
        task: as in `TaskMetric`, as is `metric`.
        metric: its name.
        value: the model's less the first model's.
        stderr: standard error of `value`, None where it has none.
        paired: whether it is the error over single questions; otherwise the two models' errors taken together.
    """

    model: str
    task: str
    metric: str
    value: float
    stderr: float | None
    paired: bool

    @property
    def mark(self) -> str:
        """`*` beyond one standard error, `**` beyond two."""
        if self.stderr is None or self.value == 0:
            return ""
        return "**" if abs(self.value) > 2 * self.stderr else "*" if abs(self.value) > self.stderr else ""


def differences(first: ModelResult, other: ModelResult) -> Iterator[Difference]:
    """Differences of every metric that both models have."""
    ours = {(row.task, row.metric): row for row in first.metrics}
    for row in other.metrics:
        base = ours.get((row.task, row.metric))
        if base is None or not (math.isfinite(base.value) and math.isfinite(row.value)):
            continue
        paired = _paired_stderr(first, other, base, row)
        stderr = paired
        if paired is None and base.stderr is not None and row.stderr is not None:
            stderr = math.hypot(base.stderr, row.stderr)
        yield Difference(other.model, row.task, row.metric, row.value - base.value, stderr, paired is not None)


def _perplexity_metrics(result: PerplexityResult | None) -> list[TaskMetric]:
    """Their errors follow to first order from the loss's."""
    if result is None:
        return []
    values = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
    return [
        TaskMetric(
            task=TEXT_ROW,
            metric=metric,
            value=value,
            stderr=None if result.loss_stderr is None else result.loss_stderr * _derivative(result, metric),
            num_samples=result.num_tokens,
        )
        for metric, value in values.items()
        if value is not None
    ]


def _derivative(result: PerplexityResult, metric: str) -> float:
    """Derivative of a metric with respect to the loss."""
    if metric == "bits_per_byte":
        assert result.num_bytes
        return result.num_tokens / result.num_bytes / math.log(2)
    return {"loss": 1.0, "perplexity": result.perplexity}[metric]


def _paired_stderr(first: ModelResult, other: ModelResult, base: TaskMetric, row: TaskMetric) -> float | None:
    if row.task == TEXT_ROW:
        return _paired_windows(first, other, row.metric)
    ours, theirs = _questions(first.tasks, base), _questions(other.tasks, row)
    if ours is None or theirs is None or len(ours) != len(theirs) or len(ours) < 2:
        return None
    return float((theirs - ours).std(ddof=1) / math.sqrt(len(ours)))


def _questions(tasks: HarnessResult | None, row: TaskMetric) -> np.ndarray | None:
    """The values that a metric is the mean of, `[questions]`; None where it is not a mean of them."""
    assert tasks is not None, "a row of no task"
    answers = (tasks.answers.get((task, row.metric), []) for task in _leaves(row.task, tasks.record))
    values = np.array(list(chain.from_iterable(answers)))
    return values if len(values) and abs(values.mean() - row.value) <= MEAN_TOLERANCE else None


def _leaves(task: str, record: dict[str, Any]) -> Iterator[str]:
    """The task itself, or the tasks of a group."""
    parts = record.get("group_subtasks", {}).get(task)
    if not parts:
        yield task
    else:
        for part in parts:
            yield from _leaves(part, record)


def _paired_windows(first: ModelResult, other: ModelResult, metric: str) -> float | None:
    """Standard error of a difference between two ratios Σ loss ÷ Σ tokens of the same windows, to first order."""
    if first.windows is None or other.windows is None:
        return None
    counts = first.windows.counts
    if len(counts) < 2 or not np.array_equal(counts, other.windows.counts):
        return None
    moved = _influences(other, other.windows, metric) - _influences(first, first.windows, metric)
    return float(np.sqrt(len(counts) / (len(counts) - 1) * np.square(moved).sum()))


def _influences(result: ModelResult, windows: ScoredWindows, metric: str) -> np.ndarray:
    """How much each window moves the metric, `[windows]`."""
    assert result.perplexity is not None
    residuals = windows.sums - result.perplexity.loss * windows.counts
    return _derivative(result.perplexity, metric) * residuals / windows.counts.sum()
