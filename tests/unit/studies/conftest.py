"""A small study on disk, and results as its cells would leave them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsecod_megatron.config import save_config
from sparsecod_megatron.studies import Cell, Study, load_study
from sparsecod_megatron.studies.cell import measurement

BASE: dict[str, Any] = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48, "vocab_size": 256},
    "precision": {"dtype": "fp32"},
    "data": {"seq_length": 16},
    "optimizer": {"lr": 1e-3},
    "train": {"train_steps": 10, "global_batch_size": 4, "micro_batch_size": 4, "eval_interval": 0},
}
STUDY: dict[str, Any] = {
    "name": "small",
    "question": "Does it matter?",
    "base": "base.yaml",
    "grid": [
        {"name": "depth", "key": "model.num_layers", "values": [2, 4]},
        {"name": "decay", "cells": {"none": {"optimizer.weight_decay": 0}, "some": {"optimizer": {"weight_decay": 1}}}},
    ],
    "seeds": [1, 2, 3],
    "scores": {"seq_length": 8},
    "columns": ["perplexity", "out_var_last"],
    "scatter": [{"across": "out_var_last", "up": "perplexity"}],
}
WriteStudy = Callable[..., Path]


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """Writes base and study, whose keys the arguments replace; returns the study's path."""

    def write(**keys: Any) -> Path:
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(STUDY | keys))
        return path

    return write


def leave_result(
    study: Study,
    cell: Cell,
    metrics: dict[str, float],
    *,
    diverged: bool = False,
    points: Sequence[dict[str, Any]] = (),
) -> None:
    """What a finished cell leaves of itself."""
    cell.directory.mkdir(parents=True, exist_ok=True)
    save_config(cell.config, cell.directory / "config.yaml")
    result = {
        "cell": cell.name,
        "labels": dict(cell.labels),
        "seed": cell.seed,
        "measured": measurement(study),
        "diverged": diverged,
        "metrics": metrics,
        "points": list(points),
    }
    (cell.directory / "result.json").write_text(json.dumps(result))


@pytest.fixture
def small_study(write_study: WriteStudy, tmp_path: Path) -> Study:
    return load_study(write_study(), tmp_path / "out")
