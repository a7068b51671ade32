"""Evaluation results as a JSON file for programs and a Markdown table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsecod_megatron.evaluation.harness import TaskMetric
from sparsecod_megatron.evaluation.result import Difference, ModelResult, differences
from sparsecod_megatron.files import write_text


def write_report(output: Path, settings: dict[str, Any], results: Sequence[ModelResult]) -> str:
    """Write `results.json` and `results.md`.

    Args:
        output: folder of both files, made where absent.
        settings: what was run: models, sources, dtype, device, seed, limit.
        results: results of one model, or of several that are compared with the first.

    Returns:
        The Markdown.
    """
    records = [_record(result) for result in results]
    if len(results) == 1:
        record, text = records[0], markdown_table(results[0].metrics)
    else:
        found = [difference for other in results[1:] for difference in differences(results[0], other)]
        record = {
            "models": {result.model: of_model for result, of_model in zip(results, records, strict=True)},
            "differences": [asdict(difference) for difference in found],
        }
        text = comparison_table(results, found)
    text += "".join(_truncation(result) for result in results)
    write_text(
        output / "results.json", json.dumps(_strict({"settings": settings, **record}), indent=2, allow_nan=False) + "\n"
    )
    write_text(output / "results.md", text)
    return text


def markdown_table(rows: Sequence[TaskMetric]) -> str:
    """One line per metric: task, metric, value, ± standard error, n."""
    cells = [
        [
            row.task,
            row.metric,
            _number(row.value),
            f"± {_number(row.stderr)}" if row.stderr is not None else "–",
            str(row.num_samples),
        ]
        for row in rows
    ]
    return _grid(["task", "metric", "value", "± stderr", "n"], cells)


def comparison_table(results: Sequence[ModelResult], found: Sequence[Difference]) -> str:
    """Tasks down, models across, each value with its standard error and the mark of its difference from the first."""
    marks = {(difference.model, difference.task, difference.metric): difference.mark for difference in found}
    values = {(result.model, row.task, row.metric): row for result in results for row in result.metrics}
    lines = dict.fromkeys((row.task, row.metric) for result in results for row in result.metrics)
    cells = []
    for task, metric in lines:
        rows = [values.get((result.model, task, metric)) for result in results]
        counts = "/".join(dict.fromkeys(str(row.num_samples) for row in rows if row is not None))
        shown = [
            "–" if row is None else _value(row, marks.get((result.model, task, metric), ""))
            for result, row in zip(results, rows, strict=True)
        ]
        cells.append([task, metric, counts, *shown])
    legend = (
        f"\n`*` differs from {results[0].model} by more than one standard error of the difference, `**` by more than "
        "two; the error is that over single questions or windows where both models had the same.\n"
    )
    return _grid(["task", "metric", "n", *(result.model for result in results)], cells) + legend


def _record(result: ModelResult) -> dict[str, Any]:
    tasks = result.tasks
    return {
        "perplexity": None if result.perplexity is None else asdict(result.perplexity),
        "tasks": [] if tasks is None else [asdict(metric) for metric in tasks.metrics],
        "num_truncated": 0 if tasks is None else tasks.num_truncated,
        "lm_eval": None if tasks is None else tasks.record,
    }


def _truncation(result: ModelResult) -> str:
    number = result.tasks.num_truncated if result.tasks else 0
    if not number:
        return ""
    return (
        f"\n{result.model}: {number} prompts are longer than the model takes and were scored without their beginning.\n"
    )


def _grid(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table whose columns are padded to read well in a terminal; the first two hold words."""
    widths = [max(3, *(len(line[column]) for line in [header, *lines])) for column in range(len(header))]
    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    return "".join(
        "| "
        + " | ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |\n"
        for line in [header, rule, *lines]
    )


def _value(row: TaskMetric, mark: str) -> str:
    stderr = "" if row.stderr is None else f" ± {_number(row.stderr)}"
    return f"{_number(row.value)}{stderr} {mark:<2}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _strict(value: Any) -> Any:
    """What JSON can hold: infinity and NaN become null, functions in lm-eval's record their name, the rest its text."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
