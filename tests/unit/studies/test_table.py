"""The one table: what it says of finished, diverged and missing cells, in three formats that agree; and its figures."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsecod_megatron.errors import ConfigError, SparsecodError
from sparsecod_megatron.studies import Study, load_study
from sparsecod_megatron.studies.cell import unfinished
from sparsecod_megatron.studies.figures import draw_figures
from sparsecod_megatron.studies.kept import kept_cells
from sparsecod_megatron.studies.table import finished_cells, make_table, write_table
from tests.unit.studies.conftest import WriteStudy, leave_result

CLAIM = {
    "text": "decay lowers variance",
    "metric": "out_var_last",
    "higher": {"decay": "none"},
    "lower": {"decay": "some"},
    "published": "2 against 1",
}


@pytest.fixture
def half_done(write_study: WriteStudy, tmp_path: Path) -> Study:
    """Depth 2 is done, one of its cells diverged; of depth 4 nothing is."""
    study = load_study(write_study(claims=[CLAIM]), tmp_path / "out")
    for cell in study.cells[:6]:
        decays = ("decay", "some") in cell.labels
        metrics = {"parameters_total": 1e6, "tokens": 640.0, "perplexity": 10.0 + cell.seed, "out_var_last": 2 - decays}
        lost = decays and cell.seed == 3
        leave_result(study, cell, {} if lost else metrics, diverged=lost)
    return study


def test_three_formats_agree(half_done: Study) -> None:
    text = write_table(half_done, make_table(half_done.config, finished_cells(half_done)), command="sparsecod study …")
    assert text == (half_done.output / "table.md").read_text()
    lines = [[entry.strip() for entry in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 2")]
    assert [line[:2] for line in lines] == [["2", "none"], ["2", "some"]]
    assert lines[0][2:] == ["1M", "–", "640", "12 [9.516, 14.48]", "2 [2, 2]", "3"]
    assert lines[1][-1] == "3, 1 diverged"
    assert "| decay lowers variance | 2 against 1 | out_var_last | 1 [1, 1] | **supported** | supported (p 0) |" in text
    with (half_done.output / "table.csv").open() as stream:
        rows = {(row["decay"], row["metric"]): row for row in csv.DictReader(stream)}
    content = json.loads((half_done.output / "table.json").read_text())
    for row in content["rows"]:
        for name, mean in row["metrics"].items():
            written = rows[row["labels"]["decay"], name]
            assert float(written["mean"]) == mean["value"] and int(written["seeds"]) == mean["count"]
    assert len(content["cells"]) == 6 and content["claims"][0]["verdict"] == "supported"


def test_what_is_left_to_do(half_done: Study) -> None:
    assert [cell.name for cell in unfinished(half_done)] == [cell.name for cell in half_done.cells[6:]]


def test_figures(half_done: Study) -> None:
    drawn = draw_figures(half_done, make_table(half_done.config, finished_cells(half_done)))
    assert [path.name for path in drawn] == ["perplexity.png", "out_var_last.png", "perplexity_by_out_var_last.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("scores.samples=5", "was measured with other `scores` or `evaluation`"),
        ("run.optimizer.lr=0.5", "the study now gives this cell another run"),
    ],
)
def test_results_of_another_study_are_not_mixed_in(
    override: str, message: str, half_done: Study, write_study: WriteStudy
) -> None:
    changed = load_study(write_study(claims=[CLAIM]), half_done.output, [override])
    with pytest.raises(ConfigError, match=message):
        make_table(changed.config, finished_cells(changed))


def test_a_study_of_one_run_has_a_table(write_study: WriteStudy, tmp_path: Path) -> None:
    study = load_study(write_study(grid=[], seeds=[5]), tmp_path / "out")
    leave_result(study, study.cells[0], {"perplexity": 3.0})
    table = make_table(study.config, finished_cells(study))
    assert "| – | – | – | 3 | – | 1 |" in write_table(study, table, command="x")
    assert len(draw_figures(study, table)) == 1


# ---------------------------------------------------------------- from what is kept


def test_the_table_is_the_same_from_what_it_keeps(half_done: Study, tmp_path: Path) -> None:
    text = write_table(half_done, make_table(half_done.config, finished_cells(half_done)), command="x")
    kept = kept_cells(half_done, half_done.output / "table.json")
    assert [cell.diverged for cell in kept].count(True) == 1
    elsewhere = replace(half_done, output=tmp_path / "again")
    assert write_table(elsewhere, make_table(elsewhere.config, kept), command="x") == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "other"}, "of study other, and this is"),
        ({"cells": [{"labels": {"depth": "9"}, "seed": 1, "metrics": {}}]}, "1 of 1 cells are none of the study's"),
        ({"cells": [{"seed": 1}]}, "not the results of a study"),
    ],
)
def test_what_is_kept_of_something_else_is_refused(
    changes: dict[str, Any], message: str, half_done: Study, tmp_path: Path
) -> None:
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({"study": half_done.config.name, "cells": []} | changes))
    with pytest.raises(SparsecodError, match=message):
        kept_cells(half_done, path)
