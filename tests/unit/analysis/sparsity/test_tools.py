"""The entry scripts as a user runs them, and the command on a dense and on a sparse model."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main
from tests.helpers.cli import script
from tests.unit.analysis.sparsity.tiny import tiny_model

DECAY = "tools/analyze_weight_decay_sparsity.py"


def run_tool(repo_root: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(repo_root / "tools" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=repo_root, timeout=240, check=False)


def test_decay_table_tells_norm_from_sparsity(tmp_path: Path, repo_root: Path) -> None:
    for name, scale in (("weak", 1.0), ("strong", 0.1)):
        model = tiny_model("llama")
        for block in model.model.layers:
            for parameter in block.parameters():
                parameter.data.mul_(scale)
        model.save_pretrained(tmp_path / name)
    models = [str(tmp_path / "weak"), str(tmp_path / "strong")]
    options = ["--weight-decay", "0", "1", "--lr", "0.02", "--output", str(tmp_path / "out")]
    done = script(repo_root / DECAY, *models, *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "weight_decay_sparsity.json").read_text())
    weak, strong = (row for row in rows if row["kind"] == "all")
    assert weak["equilibrium_std"] is None and strong["equilibrium_std"] == pytest.approx(math.sqrt(0.02 / 2))
    assert strong["below_init_1e-02"] > 3 * weak["below_init_1e-02"]
    assert strong["below_own_1e-02"] == pytest.approx(weak["below_own_1e-02"], abs=1e-3)
    with (tmp_path / "out" / "weight_decay_sparsity.csv").open() as file:
        assert [row["kind"] for row in csv.DictReader(file)] == [row["kind"] for row in rows]


def test_a_mistake_is_one_line(tmp_path: Path, repo_root: Path) -> None:
    done = script(repo_root / DECAY, tmp_path, tmp_path, "--weight-decay", "1", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1].startswith("analyze_weight_decay_sparsity: --weight-decay: 1 values for 2")
    )
    assert not (tmp_path / "out" / "weight_decay_sparsity.csv").exists()


LAYERS = {"weights": 5, "attention_by_layer": 5, "activation": 5}
"""Tables with a row a layer and kind, and layers of stories260K."""


def test_the_command_measures_a_pretrained_model(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text((shared_data / "text" / "wikitext2_valid.txt").read_text()[:20_000])
    options = ["--data", str(text), "--samples", "4", "--seq-length", "64", "--output", str(tmp_path / "out")]
    model = str(shared_data / "models" / "stories260K_hf")
    assert main(["analyze", model, "--scores", "weights,attention,activation", *options]) == 0, capsys.readouterr().err
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["scores"]
    assert list(scores) == ["weights", "attention", "activation"]
    assert scores["weights"]["values"]["elements"] == 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172)
    for score, value in (("attention", "entropy"), ("activation", "sparsity")):
        measured = scores[score]["values"][value]
        assert 0 < measured["low"] <= measured["value"] <= measured["high"] < 1, score
    for table, layers in LAYERS.items():
        with (tmp_path / "out" / f"{table}.csv").open() as file:
            assert {int(row["layer"]) for row in csv.DictReader(file)} == set(range(layers)), table


@pytest.mark.parametrize(("tool", "score"), [("weight", "weights"), ("attention", "attention")])
def test_scripts_pass_their_score_on(tool: str, score: str, repo_root: Path, tmp_path: Path) -> None:
    done = run_tool(repo_root, f"analyze_{tool}_sparsity.py", str(tmp_path), "--output", str(tmp_path / "out"))
    assert done.returncode == 2 and "--data" in done.stderr
    shown = run_tool(repo_root, f"analyze_{tool}_sparsity.py", "--help")
    assert shown.returncode == 0 and f"the `{score}` score alone" in shown.stdout
