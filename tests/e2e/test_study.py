"""`sparsecod study` on real runs: cells that train, one that diverges, a cell that was done before, one table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.helpers.cli import sparsecod
from tests.helpers.text import write_corpus

pytestmark = [pytest.mark.e2e]
BASE = {
    "model": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48},
    "precision": {"dtype": "fp32"},
    "data": {"seq_length": 16},
    "train": {"train_steps": 4, "global_batch_size": 4, "micro_batch_size": 4, "eval_interval": 0},
    "statistics": {"variance": {"interval": 2}},
    "checkpoint": {"save_interval": 0},
}
STUDY = {
    "name": "small",
    "question": "What does the learning rate do?",
    "base": "base.yaml",
    "grid": [{"name": "lr", "cells": {"fine": {"optimizer.lr": 1e-2}, "endless": {"optimizer.lr": 1e38}}}],
    "seeds": [1],
    "scores": {"names": ["causal", "usefulness"], "samples": 4, "seq_length": 8},
    "evaluation": {"windows": 4},
    "launch": {"slots": 2},
    "columns": ["perplexity", "out_var_last", "causal/causal"],
    "keep_checkpoints": False,
}


def test_a_study_of_two_cells(tmp_path: Path) -> None:
    text, prefix = write_corpus(tmp_path / "text"), tmp_path / "data/small"
    sparsecod("data", "--input", text, "--tokenizer", "train:384", "--output", prefix, "--val-fraction", "0.2")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    output = tmp_path / "out"
    command = ["study", tmp_path / "study.yaml", "--output", output, f"run.data.prefix={prefix}"]

    sparsecod(*command, "--cell", "lr=fine,seed=1")
    fine = output / "cells/lr=fine,seed=1"
    before = (fine / "result.json").stat().st_mtime_ns
    assert (fine / "hf/model.safetensors").is_file() and not (fine / "run/checkpoints").exists()
    assert "1 of 2 cells to run" in sparsecod(*command, "--dry-run").stdout

    table = sparsecod(*command).stdout
    assert (fine / "result.json").stat().st_mtime_ns == before, "a finished cell ran again"
    metrics = json.loads((fine / "result.json").read_text())["metrics"]
    evaluated = json.loads((fine / "eval/results.json").read_text())
    scores = json.loads((fine / "analysis/scores.json").read_text())["scores"]
    statistics = (fine / "run/layer_statistics.jsonl").read_text().splitlines()
    assert metrics["perplexity"] == evaluated["perplexity"]["perplexity"]
    assert metrics["causal/causal"] == scores["causal"]["values"]["causal"]["value"]
    assert metrics["out_var_last"] == json.loads(statistics[-1])["layers"][-1]["out_var"]
    assert metrics["tokens"] == 4 * 4 * 16
    assert json.loads((output / "cells/lr=endless,seed=1/result.json").read_text())["diverged"]
    assert "| endless |" in table and "1, 1 diverged" in table
    assert {path.stem for path in (output / "figures").iterdir()} == {
        "perplexity",
        "out_var_last",
        "causal_causal",
        "variance_by_depth",
    }

    (fine / "result.json").unlink()  # as if killed while scoring: what was trained and scored is used again
    sparsecod(*command)
    assert json.loads((fine / "result.json").read_text())["metrics"] == metrics
    refused = sparsecod(*command, "run.train.train_steps=6", check=False)
    assert refused.returncode == 2 and "gives this cell another run" in refused.stderr
