"""One cell from nothing to its numbers: trained, exported, scored, evaluated; what is done already is left alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparsecod_megatron.checkpoint.paths import resolve_step_dir, step_dir_name
from sparsecod_megatron.config import load_config, save_config
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR, CONFIG_FILE, METRICS_FILE
from sparsecod_megatron.config.stop_signals import handling_stop_signals
from sparsecod_megatron.errors import ConfigError, SparsecodError
from sparsecod_megatron.files import write_text
from sparsecod_megatron.mechanisms import SAVED_MECHANISMS
from sparsecod_megatron.studies.grid import RUN_FOLDER, Cell, Study
from sparsecod_megatron.studies.metrics import cell_metrics, measured_intervals
from sparsecod_megatron.studies.scoring import (
    ANALYSIS_FOLDER,
    EVALUATION_FOLDER,
    MODEL_FOLDER,
    evaluate,
    export,
    score,
)
from sparsecod_megatron.studies.steps import measure_steps

RESULT_FILE = "result.json"


def run_cell(study: Study, cell: Cell) -> None:
    """Do the remaining work of a cell, `result.json` last.

    Raises:
        SparsecodError: a stage that refuses its input; the cell's folder holds what came before.
        RuntimeError: the training failed otherwise; its words are on stderr.
    """
    if is_done(study, cell):
        return
    model, run = cell.directory / MODEL_FOLDER, trained_run(cell)
    if not (model / "config.json").is_file():
        write_config(cell)
        _train(cell, nproc=study.config.launch.nproc)
        if _diverged(cell):
            write_result(cell.directory, _result(study, cell) | {"diverged": True, "metrics": {}})
            return
        export(run, model, verify=study.config.verify)
    points = measure_steps(study.config, cell.config, run=run, directory=cell.directory)
    if not study.config.keep_checkpoints and (run / CHECKPOINTS_DIR).is_dir():
        shutil.rmtree(run / CHECKPOINTS_DIR)
    score(study.config.scores, cell.config.data, model, cell.directory / ANALYSIS_FOLDER)
    evaluate(study.config.evaluation, cell.config.data, model, cell.directory / EVALUATION_FOLDER)
    metrics = cell_metrics(
        cell.config,
        run=run,
        analysis=cell.directory / ANALYSIS_FOLDER,
        evaluation=cell.directory / EVALUATION_FOLDER,
    )
    result = _result(study, cell) | {"diverged": False, "metrics": metrics}
    if points:
        last = {
            "step": cell.config.train.train_steps,
            "tokens": metrics["tokens"],
            "metrics": metrics,
            "intervals": measured_intervals(cell.directory / ANALYSIS_FOLDER),
        }
        result["points"] = [*points, last]
    write_result(cell.directory, result)


def is_done(study: Study, cell: Cell) -> bool:
    """Whether the cell has its result, of this run, these scores and this evaluation.

    Raises:
        ConfigError: what lies there was trained or measured otherwise.
    """
    path = cell.directory / RESULT_FILE
    if not path.is_file():
        return False
    if read_result(cell.directory)["measured"] != measurement(study):
        raise ConfigError(
            f"{path}: was measured with other `scores` or `evaluation`; to measure again, delete it with the "
            f"{ANALYSIS_FOLDER} and {EVALUATION_FOLDER} beside it, or give another --output"
        )
    _check_unchanged(cell)
    return True


def read_result(directory: Path) -> dict[str, Any]:
    """`result.json` of a finished cell."""
    content: dict[str, Any] = json.loads((directory / RESULT_FILE).read_text(encoding="utf-8"))
    return content


def write_result(directory: Path, content: dict[str, Any]) -> None:
    """Say in `result.json` that a cell is finished."""
    write_text(directory / RESULT_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")


def unfinished(study: Study) -> list[Cell]:
    """Cells that have no result yet."""
    return [cell for cell in study.cells if not is_done(study, cell)]


def trained_run(cell: Cell) -> Path:
    """The cell's run directory."""
    return cell.directory / RUN_FOLDER


def measurement(study: Study) -> dict[str, Any]:
    """What changes a cell's numbers besides its run."""
    scores, held_out = study.config.scores, study.config.evaluation
    steps = {"steps": scores.steps, "spacing": scores.spacing} if scores.steps else {}
    asked = {"task": scores.task, "difficulties": scores.difficulties} if scores.task is not None else {}
    return {
        "scores": {
            "names": scores.names,
            "samples": scores.samples,
            "seq_length": scores.seq_length,
            "seed": scores.seed,
            **steps,
            **asked,
        },
        "evaluation": {"windows": held_out.windows, "tasks": held_out.tasks, "limit": held_out.limit},
    }


def write_config(cell: Cell) -> None:
    """Make the cell's folder, with the run that it is to train in `config.yaml`.

    Raises:
        ConfigError: another run is there.
    """
    _check_unchanged(cell)
    cell.directory.mkdir(parents=True, exist_ok=True)
    save_config(cell.config, cell.directory / CONFIG_FILE)


def _check_unchanged(cell: Cell) -> None:
    path = cell.directory / CONFIG_FILE
    if path.is_file() and load_config(path, mechanisms=SAVED_MECHANISMS) != cell.config:
        raise ConfigError(
            f"{path}: the study now gives this cell another run; give another --output, or delete the cell"
        )


def _train(cell: Cell, *, nproc: int) -> None:
    """Train in processes of its own, which leave memory and settings of this one alone."""
    if _is_trained(cell):
        return
    command = [sys.executable, "-m", "sparsecod_megatron", "train", str(cell.directory / CONFIG_FILE)]
    # A signal to the process group stops the training alone, which saves, while this process waits for it.
    with handling_stop_signals(lambda *_: None):
        status = subprocess.run([*command, "--nproc", str(nproc)], stdout=subprocess.DEVNULL).returncode
    if _is_trained(cell) or (status == 2 and _diverged(cell)):
        return
    if status == 2:
        raise SparsecodError(f"cell {cell.name}: the training was refused, for the reason above")
    if status == 0:
        raise SparsecodError(f"cell {cell.name}: asked to stop; the same command resumes from there")
    raise RuntimeError(f"cell {cell.name}: the training ended with status {status}; see its output above")


def _is_trained(cell: Cell) -> bool:
    run = trained_run(cell)
    last = run / CHECKPOINTS_DIR / step_dir_name(cell.config.train.train_steps)
    return last.is_dir() and resolve_step_dir(run) == last


def _diverged(cell: Cell) -> bool:
    path = trained_run(cell) / METRICS_FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return bool(lines) and bool(json.loads(lines[-1]).get("diverged"))


def _result(study: Study, cell: Cell) -> dict[str, Any]:
    return {"cell": cell.name, "labels": dict(cell.labels), "seed": cell.seed, "measured": measurement(study)}
