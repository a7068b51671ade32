"""Evaluation results as a JSON file for programs and a Markdown table for people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsecod_megatron.evaluation.files import write_text
from sparsecod_megatron.evaluation.harness import HarnessResult, TaskMetric
from sparsecod_megatron.evaluation.perplexity import PerplexityResult


def write_report(
    output: Path, settings: dict[str, Any], perplexity: PerplexityResult | None, tasks: HarnessResult | None
) -> str:
    """Write `results.json` and `results.md`.

    Args:
        output: folder of both files, made where absent.
        settings: what was run: model, sources, dtype, device, seed, limit.
        perplexity: None where it was not asked for.
        tasks: None where none was asked for.

    Returns:
        The Markdown table.
    """
    results = {
        "settings": settings,
        "perplexity": None if perplexity is None else asdict(perplexity),
        "tasks": [] if tasks is None else [asdict(metric) for metric in tasks.metrics],
        "lm_eval": None if tasks is None else tasks.record,
    }
    table = markdown_table([*_perplexity_rows(perplexity), *(tasks.metrics if tasks else [])])
    write_text(output / "results.json", json.dumps(_strict(results), indent=2, allow_nan=False) + "\n")
    write_text(output / "results.md", table)
    return table


def markdown_table(rows: Iterable[TaskMetric]) -> str:
    """One line a metric: task, metric, value, ± standard error, n; columns padded to read well in a terminal."""
    cells = [["task", "metric", "value", "± stderr", "n"]]
    for row in rows:
        stderr = "–" if row.stderr is None else f"± {_number(row.stderr)}"
        cells.append([row.task, row.metric, _number(row.value), stderr, str(row.num_samples)])
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(5)]
    rule = ["-" * width if column < 2 else "-" * (width - 1) + ":" for column, width in enumerate(widths)]
    lines = [cells[0], rule, *cells[1:]]
    return "".join(
        "| "
        + " | ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |\n"
        for line in lines
    )


def _perplexity_rows(result: PerplexityResult | None) -> list[TaskMetric]:
    """Loss, perplexity and bits per byte ; the latter two's errors follow to first order from the loss's."""
    if result is None:
        return []
    derivatives = {"loss": 1.0, "perplexity": result.perplexity}
    values = {"loss": result.loss, "perplexity": result.perplexity}
    if result.bits_per_byte is not None and result.num_bytes:
        values["bits_per_byte"] = result.bits_per_byte
        derivatives["bits_per_byte"] = result.num_tokens / result.num_bytes / math.log(2)
    return [
        TaskMetric(
            task="held-out text",
            metric=metric,
            value=value,
            stderr=None if result.loss_stderr is None else result.loss_stderr * derivatives[metric],
            num_samples=result.num_tokens,
        )
        for metric, value in values.items()
    ]


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


def _strict(value: Any) -> Any:
    """What JSON can hold: infinity and NaN become null, and other objects in lm-eval's record their text."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)
