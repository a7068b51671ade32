"""Result files: strict JSON, a table with standard errors, never half a file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.evaluation.files import check_writable, write_text
from sparsecod_megatron.evaluation.harness import HarnessResult, TaskMetric
from sparsecod_megatron.evaluation.perplexity import PerplexityResult
from sparsecod_megatron.evaluation.report import markdown_table, write_report

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
    table = write_report(tmp_path, {}, RESULT, tasks)
    assert cells(table)[2:] == [
        ["held-out text", "loss", "2.0000", "± 0.1000", "100"],
        ["held-out text", "perplexity", "7.3891", "± 0.7389", "100"],
        ["held-out text", "bits_per_byte", "0.7213", "± 0.0361", "100"],
        ["arc", "acc", "0.2500", "–", "4"],
    ]
    assert all(set(cell) <= {"-", ":"} and "---"[:2] in cell for cell in cells(table)[1])
    assert (tmp_path / "results.md").read_text(encoding="utf-8") == table


def test_json_is_strict_and_complete(tmp_path: Path) -> None:
    record = {"results": {"arc": {"acc,none": math.nan, "alias": "arc"}}, "model": Path("x"), "n": (1, 2)}
    diverged = TaskMetric("arc", "ppl", math.inf, math.nan, 4)
    write_report(tmp_path, {"seed": 0, "model": Path("x")}, RESULT, HarnessResult([diverged], record))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert results["settings"] == {"seed": 0, "model": "x"}
    assert PerplexityResult(**results["perplexity"]) == RESULT
    assert results["tasks"] == [{"task": "arc", "metric": "ppl", "value": None, "stderr": None, "num_samples": 4}]
    assert results["lm_eval"] == {"results": {"arc": {"acc,none": None, "alias": "arc"}}, "model": "x", "n": [1, 2]}


def test_large_values_stay_readable() -> None:
    assert cells(markdown_table([TaskMetric("t", "ppl", 1.5e9, 2e7, 3)]))[2][2:4] == ["1.5000e+09", "± 2.0000e+07"]


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "results.md"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert [entry.read_text() for entry in path.parent.iterdir()] == ["old"]


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "a" / "b")
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        check_writable(tmp_path / "file" / "eval")
