"""Cells taken from another study: those of the same run and measurement, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main
from sparsecod_megatron.studies import load_study
from sparsecod_megatron.studies.cell import is_done, unfinished
from sparsecod_megatron.studies.shared_cells import shared_cells, take_over
from sparsecod_megatron.studies.table import finished_cells, make_table
from tests.unit.studies.conftest import WriteStudy, leave_result

OTHER_AXIS = {"name": "rate", "cells": {"slow": {"optimizer.lr": 1e-4}, "plain": {"optimizer.lr": 1e-3}}}


@pytest.fixture(name="donor")
def _donor(write_study: WriteStudy, tmp_path: Path) -> Path:
    """Output of a study of depth and decay, one of whose cells has not run; each has its depth as its perplexity."""
    study = load_study(write_study(), tmp_path / "donor", [])
    for cell in study.cells[:-1]:
        leave_result(study, cell, {"perplexity": float(cell.config.model.num_layers)})
        for weights in ("hf/model.safetensors", "run/checkpoints/step_00000010/weights", "analysis/scores.json"):
            path = cell.directory / weights
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}")
    return tmp_path / "donor"


def test_equal_cells_are_taken_over(donor: Path, write_study: WriteStudy, tmp_path: Path) -> None:
    path = write_study(name="other", grid=[OTHER_AXIS], run={"optimizer.weight_decay": 0, "model.num_layers": 4})
    study = load_study(path, tmp_path / "other", [])
    shared = shared_cells(study, [donor])
    assert shared == {f"rate=plain,seed={seed}": donor / f"cells/depth=4,decay=none,seed={seed}" for seed in (1, 2, 3)}
    take_over(study, shared)
    assert [cell.name for cell in unfinished(study)] == [f"rate=slow,seed={seed}" for seed in (1, 2, 3)]
    (row,) = (row for row in make_table(study.config, finished_cells(study)).rows if row.num_seeds)
    assert row.labels == (("rate", "plain"),) and row.metrics["perplexity"].value == 4
    taken = study.cell("rate=plain,seed=2").directory
    assert (taken / "analysis/scores.json").is_file()
    assert not (taken / "hf").exists() and not (taken / "run/checkpoints").exists()
    again = load_study(write_study(name="third", grid=[OTHER_AXIS], run=study.config.run), tmp_path / "third", [])
    take_over(again, shared_cells(again, [tmp_path / "other"]))
    result = json.loads((again.cell("rate=plain,seed=2").directory / "result.json").read_text())
    assert result["shared_from"] == str(donor / "cells/depth=4,decay=none,seed=2"), "where it ran, not where it lay"


def test_what_was_measured_or_trained_otherwise_is_left(donor: Path, write_study: WriteStudy, tmp_path: Path) -> None:
    for other in ({"scores": {"seq_length": 4}}, {"run": {"optimizer.lr": 2e-3}}, {"seeds": [7]}):
        assert shared_cells(load_study(write_study(**other), tmp_path / "other", []), [donor]) == {}
    study = load_study(write_study(), tmp_path / "same", [])
    begun, unrun = study.cells[0], study.cells[-1]
    begun.directory.mkdir(parents=True)
    assert {cell.name for cell in study.cells} - set(shared_cells(study, [donor])) == {begun.name, unrun.name}
    assert not is_done(study, begun)


def test_a_directory_that_is_no_study_is_refused(
    write_study: WriteStudy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["study", str(write_study()), "--output", str(tmp_path / "new"), "--reuse", str(tmp_path)]
    assert main(command) == 2
    assert f"--reuse {tmp_path}: has no cells; give the --output of a study that was run" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
