"""`sparsecod study` on real runs: cells that train, one that diverges, a cell that was done before, one table."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sparsecod_megatron.cli.main import main
from sparsecod_megatron.studies import load_study
from sparsecod_megatron.studies.cell import run_cell
from sparsecod_megatron.studies.figures import draw_figures
from sparsecod_megatron.studies.table import finished_cells, make_table, write_table
from tests.helpers.cli import sparsecod
from tests.helpers.running import ended_with_block, until
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
    "scores": {"names": ["causal", "usefulness"], "samples": 4, "seq_length": 8, "steps": 2, "spacing": "linear"},
    "evaluation": {"windows": 4},
    "launch": {"slots": 2},
    "columns": ["perplexity", "out_var_last", "causal/causal"],
    "keep_checkpoints": False,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that run it, but for the output."""
    folder = tmp_path_factory.mktemp("study")
    text, prefix = write_corpus(folder / "text"), folder / "data/small"
    sparsecod("data", "--input", text, "--tokenizer", "train:384", "--output", prefix, "--val-fraction", "0.2")
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return ["study", str(folder / "study.yaml"), f"run.data.prefix={prefix}"]


def test_a_study_of_two_cells(study: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [*study, "--output", output]

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
    point, last = json.loads((fine / "result.json").read_text())["points"]
    assert (point["step"], point["tokens"]) == (2, 2 * 4 * 16) and not (fine / "steps/step_00000002/hf").exists()
    assert point["metrics"].keys() >= {"loss", "perplexity", "causal/causal"}
    assert point["metrics"]["loss"] > metrics["loss"], "it has learnt since"
    assert json.loads((output / "table.json").read_text())["cells"][0]["points"] == [point, last]
    assert (last["step"], last["metrics"]) == (4, metrics)
    low, high = point["intervals"]["causal/causal"]
    assert low < point["metrics"]["causal/causal"] < high
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


def test_a_study_of_answers(tmp_path: Path) -> None:
    """Cells of a synthetic task are scored by what their blocks do for its answers, as `analyze` scores the run."""
    run = {"data": {"synthetic": {"task": "recall", "vocab_size": 8}}, "train": {"eval_interval": 4}}
    first = "answers/skip_accuracy/0"
    asked = {
        "question": "What is each block for?",
        "run": run,
        "grid": [{"name": "depth", "key": "model.num_layers", "values": [1, 2]}],
        "scores": {"names": ["answers", "integrated_gradients"], "task": "synthetic", "samples": 6},
        "columns": ["answer_accuracy", "answers/useful_share", first, "answers/skip_accuracy/1"],
        "claims": [
            {"text": "a block alone does more", "metric": first, "higher": {"depth": "2"}, "lower": {"depth": "1"}}
        ],
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | asked, sort_keys=False))
    output = tmp_path / "out"
    study = load_study(tmp_path / "study.yaml", output, ["keep_checkpoints=true", "verify=false"])
    for each in study.cells:
        run_cell(study, each)
    table = make_table(study.config, finished_cells(study))
    text = write_table(study, table, command="sparsecod study …")
    content = json.loads((output / "table.json").read_text())
    found = {row["labels"]["depth"]: row["metrics"] for row in content["rows"]}
    assert first in found["1"] and "answers/skip_accuracy/1" not in found["1"]
    (verdict,) = content["claims"]
    assert verdict["verdict"] == "not separable" and verdict["difference"]["value"] == pytest.approx(
        found["2"][first]["value"] - found["1"][first]["value"]
    )
    assert "| a block alone does more | – | answers/skip_accuracy/0 |" in text
    assert {path.stem for path in draw_figures(study, table)} >= {
        "answers_useful_share",
        "skip_accuracy_by_block",
        "integrated_gradients_by_block",
    }
    cell = output / "cells/depth=2,seed=1"
    options = ["--scores", "answers", "--task", "synthetic", "--samples", "6", "--no-verify"]
    assert main(["analyze", str(cell / "run"), *options, "--output", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again/scores.json").read_text())["scores"]["answers"]
    assert again == json.loads((cell / "analysis/scores.json").read_text())["scores"]["answers"]
    rows = [row for row in again["tables"]["answers"] if (row["intervention"], row["difficulty"]) == ("skip", "all")]
    metrics, point = (json.loads((cell / "result.json").read_text())[key] for key in ("metrics", "measured"))
    assert [metrics[f"answers/skip_accuracy/{block}"] for block in (0, 1)] == [row["accuracy"] for row in rows]
    assert (point["scores"]["task"], point["scores"]["difficulties"]) == ("synthetic", [])


def test_a_stopped_study_has_saved(study: list[str], tmp_path: Path) -> None:
    """SIGTERM reaches the training of a running cell, which saves; no further cell is started."""
    output = tmp_path / "out"
    arguments = [*study, f"--output={output}", "launch.slots=1", "run.train.train_steps=5000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsecod_megatron", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    with ended_with_block(process):
        metrics = output / "cells/lr=fine,seed=1/run/metrics.jsonl"
        until(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) > 3, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].startswith("sparsecod study: ended by SIGTERM once the running cells had saved")
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (metrics.parent / "checkpoints/latest").read_text() == f"step_{step:08d}\n"
    assert not (output / "cells/lr=endless,seed=1").exists() and not (output / "table.md").exists()
