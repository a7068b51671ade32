"""Several checkpoints of a cell, scored as its last one is: what a law over training is fitted to."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsecod_megatron.checkpoint.paths import STATE_FILE, step_dir_name
from sparsecod_megatron.config.run_files import CHECKPOINTS_DIR
from sparsecod_megatron.files import write_text
from sparsecod_megatron.studies.metrics import measured_intervals, measured_metrics
from sparsecod_megatron.studies.schema import HeldOutConfig, ScoresConfig
from sparsecod_megatron.studies.scoring import evaluate, export, score

FIRST_SHARE = 0.01
"""Share of a run's steps at which logarithmic spacing begins."""
STEPS_FOLDER, POINT_FILE = "steps", "point.json"


@dataclass(frozen=True)
class Measurement:
    """How a cell's checkpoints are measured.

    Attributes:
        scores: as the study says.
        evaluation: as the study says; tasks are asked of the last checkpoint alone.
        verify: compare an export's logits with Megatron's.
    """

    scores: ScoresConfig
    evaluation: HeldOutConfig
    verify: bool


def scored_steps(settings: ScoresConfig, train_steps: int) -> list[int]:
    """Steps before the last whose checkpoints are scored, ascending; fewer than asked for in a short run."""
    if settings.steps < 2:
        return []
    if settings.spacing == "log":
        places = np.geomspace(max(1.0, FIRST_SHARE * train_steps), train_steps, settings.steps)
    else:
        places = np.linspace(train_steps / settings.steps, train_steps, settings.steps)
    return sorted({max(round(place), 1) for place in places.tolist()} - {train_steps})


def measure_steps(how: Measurement, data: Any, train_steps: int, *, run: Path, directory: Path) -> list[dict[str, Any]]:
    """Export, score and evaluate the checkpoints of a cell before its last one; what has been is read.

    Args:
        how: scores and evaluation.
        data: the run's `DataConfig`, whose first validation source is the text.
        train_steps: of the run.
        run: its directory.
        directory: the cell's.

    Returns:
        `step`, `tokens`, `metrics` and `intervals` of each, ascending.

    Raises:
        SparsecodError: a checkpoint that is not there any more, or that cannot be scored.
    """
    found = []
    for step in scored_steps(how.scores, train_steps):
        folder = directory / STEPS_FOLDER / step_dir_name(step)
        if not (folder / POINT_FILE).is_file():
            _measure(how, data, run / CHECKPOINTS_DIR / step_dir_name(step), folder, step)
        found.append(json.loads((folder / POINT_FILE).read_text(encoding="utf-8")))
    return found


def _measure(how: Measurement, data: Any, checkpoint: Path, folder: Path, step: int) -> None:
    model = folder / "hf"
    if not (model / "config.json").is_file():
        export(checkpoint, model, verify=how.verify)
    score(how.scores, data, model, folder / "analysis")
    evaluate(replace(how.evaluation, tasks=[]), data, model, folder / "eval")
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    content = {
        "step": step,
        "tokens": state["train"]["consumed_tokens"],
        "metrics": measured_metrics(analysis=folder / "analysis", evaluation=folder / "eval"),
        "intervals": measured_intervals(folder / "analysis"),
    }
    write_text(folder / POINT_FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
    shutil.rmtree(model)  # a model for every step would fill a disk
