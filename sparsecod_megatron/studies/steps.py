"""Several checkpoints of a cell, scored as its last one is: what a law over training is fitted to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsecod_megatron.checkpoint.paths import step_dir_name
from sparsecod_megatron.config import DataConfig, RunConfig
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR
from sparsecod_megatron.files import write_text
from sparsecod_megatron.studies.metrics import measured_intervals, measured_metrics
from sparsecod_megatron.studies.schema import ScoresConfig, StudyConfig
from sparsecod_megatron.studies.scoring import (
    ANALYSIS_FOLDER,
    EVALUATION_FOLDER,
    MODEL_FOLDER,
    evaluate,
    export,
    score,
)

FIRST_SHARE = 0.01
"""Share of a run's steps at which logarithmic spacing begins."""
STEPS_FOLDER, POINT_FILE = "steps", "point.json"


def scored_steps(settings: ScoresConfig, train_steps: int) -> list[int]:
    """Steps before the last whose checkpoints are scored, ascending; fewer than asked for in a short run."""
    if settings.steps < 2:
        return []
    if settings.spacing == "log":
        places = np.geomspace(max(1.0, FIRST_SHARE * train_steps), train_steps, settings.steps)
    else:
        places = np.linspace(train_steps / settings.steps, train_steps, settings.steps)
    return sorted({max(round(place), 1) for place in places.tolist()} - {train_steps})


def measure_steps(study: StudyConfig, config: RunConfig, *, run: Path, directory: Path) -> list[dict[str, Any]]:
    """Export, score and evaluate the checkpoints of a cell before its last one; what has been is read.

    Tasks are asked of the last checkpoint alone.

    Args:
        study: its scores and evaluation.
        config: of the run, whose first validation source is the text.
        run: its directory.
        directory: the cell's.

    Returns:
        `step`, `tokens`, `metrics` and `intervals` of each, ascending.

    Raises:
        SparsecodError: a checkpoint that is not there any more, or that cannot be scored.
    """
    found = []
    for step in scored_steps(study.scores, config.train.train_steps):
        folder = directory / STEPS_FOLDER / step_dir_name(step)
        if not (folder / POINT_FILE).is_file():
            _measure(study, config.data, run / CHECKPOINTS_DIR / step_dir_name(step), folder, step)
        found.append(json.loads((folder / POINT_FILE).read_text(encoding="utf-8")))
    return found


def _measure(study: StudyConfig, data: DataConfig, checkpoint: Path, folder: Path, step: int) -> None:
    from sparsecod_megatron.checkpoint.state import read_state

    model, analysis, evaluation = (folder / name for name in (MODEL_FOLDER, ANALYSIS_FOLDER, EVALUATION_FOLDER))
    if not (model / "config.json").is_file():
        export(checkpoint, model, verify=study.verify)
    score(study.scores, data, model, analysis)
    evaluate(replace(study.evaluation, tasks=[]), data, model, evaluation)
    content = {
        "step": step,
        "tokens": read_state(checkpoint).train.consumed_tokens,
        "metrics": measured_metrics(analysis=analysis, evaluation=evaluation),
        "intervals": measured_intervals(analysis),
    }
    write_text(folder / POINT_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(model)  # a model for every step would fill a disk
