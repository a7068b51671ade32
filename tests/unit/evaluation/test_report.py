"""Result files: strict JSON, a table with standard errors, never half a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sparsecod_megatron.evaluation.harness import HarnessResult, TaskMetric
from sparsecod_megatron.evaluation.perplexity import PerplexityResult
from sparsecod_megatron.evaluation.report import markdown_table, write_report
from sparsecod_megatron.evaluation.result import ModelResult

RESULT = PerplexityResult(
    loss=2.0,
    perplexity=math.exp(2.0),
    bits_per_byte=2.0 * 100 / math.log(2) / 400,
    num_tokens=100,
    num_bytes=400,
    num_windows=10,
    seq_length=10,
    stride=10,
    loss_stderr=0.1,
    loss_low=1.8,
    loss_high=2.2,
)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_table_has_errors_of_all_rows(tmp_path: Path) -> None:
    tasks = HarnessResult([TaskMetric("arc", "acc", 0.25, None, 4)], {})
    table = write_report(tmp_path, {}, [ModelResult("a", RESULT, tasks=tasks)])
    assert cells(table)[2:] == [
        ["held-out text", "loss", "2.0000", "± 0.1000", "100"],
        ["held-out text", "perplexity", "7.3891", "± 0.7389", "100"],
        ["held-out text", "bits_per_byte", "0.7213", "± 0.0361", "100"],
        ["arc", "acc", "0.2500", "–", "4"],
    ]
    assert all(set(cell) <= {"-", ":"} and "---"[:2] in cell for cell in cells(table)[1])
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == table


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    record = {"results": {"arc": {"acc,none": math.nan, "by": cells}}, "model": Path("x"), "n": (1, 2)}
    diverged = TaskMetric("arc", "ppl", math.inf, math.nan, 4)
    tasks = HarnessResult([diverged], record, num_truncated=3)
    table = write_report(tmp_path, {"seed": 0, "model": Path("x")}, [ModelResult("x", RESULT, tasks=tasks)])
    assert "x: 3 prompts are longer than the model takes" in table

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert results["settings"] == {"seed": 0, "model": "x"}
    assert PerplexityResult(**results["perplexity"]) == RESULT
    assert results["tasks"] == [{"task": "arc", "metric": "ppl", "value": None, "stderr": None, "num_samples": 4}]
    assert results["lm_eval"] == {"results": {"arc": {"acc,none": None, "by": "cells"}}, "model": "x", "n": [1, 2]}
    assert results["num_truncated"] == 3


def test_models_stand_side_by_side(tmp_path: Path) -> None:
    """The same 25 of 100 questions right and 5 more: beyond two errors of pairs, within one of two models' errors."""
    record = {"group_subtasks": {}}

    def result(model: str, right: int) -> ModelResult:
        value = right / 100
        row = TaskMetric("arc", "acc", value, math.sqrt(value * (1 - value) / 99), 100)
        answers = {("arc", "acc"): [1.0] * right + [0.0] * (100 - right)}
        return ModelResult(model, tasks=HarnessResult([row], record, answers=answers))

    models = [result("a", 25), result("b", 30), result("c", 25), ModelResult("d", RESULT)]
    table = write_report(tmp_path, {}, models)
    header, _, *rows = cells(table.partition("\n\n")[0])
    assert header == ["task", "metric", "n", "a", "b", "c", "d"]
    assert rows[0] == ["arc", "acc", "100", "0.2500 ± 0.0435", "0.3000 ± 0.0461 **", "0.2500 ± 0.0435", "–"]
    assert rows[1] == ["held-out text", "loss", "100", "–", "–", "–", "2.0000 ± 0.1000"]
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert list(results["models"]) == ["a", "b", "c", "d"]
    assert [(row["model"], row["value"], row["paired"]) for row in results["differences"]] == [
        ("b", pytest.approx(0.05), True),
        ("c", 0, True),
    ]
    assert results["differences"][0]["stderr"] == pytest.approx(math.sqrt(0.05 * 0.95 / 99))


def test_large_values_stay_readable() -> None:
    assert cells(markdown_table([TaskMetric("t", "ppl", 1.5e9, 2e7, 3)]))[2][2:4] == ["1.5000e+09", "± 2.0000e+07"]
