"""`sparsecod analyze` as a user types it, on a tiny model saved to disk."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from sparsecod_megatron.cli.main import main
from tests.helpers.words import save_with_words, write_words
from tests.unit.analysis.scores.families import VOCAB_SIZE, tiny

SIZES = ["--samples", "6", "--seq-length", "12", "--device", "cpu"]
DEPTH_SCORES = ["causal", "permutation", "usefulness", "jacobian", "similarity", "skip", "lens"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "held_out.txt", VOCAB_SIZE, 3000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_words(tiny("llama"), tmp_path_factory.mktemp("llama"))


def test_all_depth_scores(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "analysis"
    arguments = [str(llama), "--data", str(text), *SIZES, "--compat", "reference", "--output", str(output)]
    assert main(["analyze", *arguments]) == 0
    shown = capsys.readouterr().out
    written = json.loads((output / "scores.json").read_text(encoding="utf-8"))
    assert list(written["scores"]) == DEPTH_SCORES
    settings = written["settings"]
    assert (settings["num_layers"], settings["num_samples"], settings["block_list"]) == (3, 6, "model.layers")
    for name, score in written["scores"].items():
        with (output / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        assert [set(row) for row in rows] == [set(row) for row in score["tables"][name]]
        first = next(iter(score["tables"][name][0].values()))
        assert rows[0][next(iter(rows[0]))] == str(first)
        assert score["figures"] and score["num_sequences"] in (3, 6)
        for figure in score["figures"]:
            assert image.imread(output / "plots" / f"{figure['name']}.png").std() > 0.01
    values = {name: value for score in written["scores"].values() for name, value in score["values"].items()}
    assert {"ref_permutation", "ref_useful_share", "ref_jacobian"} <= values.keys()
    assert f"{values['causal']['value']:.4g} [" in shown and "warning: the affine maps" in shown
    assert not list(output.rglob(".*"))


def test_same_seed_gives_the_same_files(llama: Path, text: Path, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        arguments = [str(llama), "--data", str(text), *SIZES, "--scores", "skip,lens", "--output", str(tmp_path / name)]
        assert main(["analyze", *arguments]) == 0
        written.append([(tmp_path / name / file).read_bytes() for file in ("scores.json", "skip.csv", "lens.csv")])
    assert written[0] == written[1]


def test_compare_pairs_the_sequences(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, model in (("a", llama), ("b", save_with_words(tiny("qwen3"), tmp_path / "qwen")), ("again", llama)):
        arguments = [str(model), "--data", str(text), *SIZES, "--scores", "causal,skip"]
        assert main(["analyze", *arguments, "--output", str(tmp_path / name)]) == 0
    folders = [str(tmp_path / name) for name in ("a", "b", "again")]
    assert main(["analyze", "--compare", folders[0], folders[1], "--output", str(tmp_path / "ab")]) == 0
    rows = json.loads((tmp_path / "ab" / "comparison.json").read_text(encoding="utf-8"))["differences"]
    scores = [json.loads((tmp_path / name / "scores.json").read_text(encoding="utf-8"))["scores"] for name in "ab"]
    assert [row["name"] for row in rows] == ["causal", "skip_loss", "block_influence"]
    for row in rows:
        one, other = (np.array(score[row["score"]]["per_sequence"][row["name"]]) for score in scores)
        assert row["difference"] == pytest.approx((other - one).mean())
        assert row["low"] < row["difference"] < row["high"]
        assert row["high"] - row["low"] == pytest.approx(3.92 * (other - one).std() / 6**0.5, rel=0.35)
        assert row["separated"] == (row["low"] > 0 or row["high"] < 0)
    capsys.readouterr()
    assert main(["analyze", "--compare", folders[0], folders[2], "--output", str(tmp_path / "same")]) == 0
    assert capsys.readouterr().out.count("not separated by this sample; raise --samples") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to analyse; give MODEL_DIR and --data, or --compare A B"),
        (["{model}"], "similarity,skip,lens: measured on text, and none is given; give --data"),
        (["{model}", "--data", "absent"], "absent: no such text file"),
        (["{model}", "--data", "{text}", "--nproc", "0"], "--nproc 0: must be at least 1"),
        (["{model}", "--data", "{text}"], "--seq-length 128: the model takes at most 64"),
        (["absent", "--data", "{text}"], "absent: no such folder"),
        (["{model}", "--data", "{text}", "--scores", "causal,depth"], "--scores depth: no such score"),
        (["{model}", "--data", "{text}", "--seq-length", "12", "--samples", "100000"], "fewer than --samples 100000"),
        (["{model}", "--data", "{text}", "--seq-length", "12", "--samples", "1"], "--samples 1: a score that fits"),
        (["{empty}", "--data", "{text}"], "no checkpoint"),
        (["--compare", "{empty}", "{empty}"], "no scores.json in it"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    filled = [option.format(model=llama, text=text, empty=tmp_path / "empty") for option in options]
    output = tmp_path / "analysis"
    assert main(["analyze", *filled, "--device", "cpu", "--output", str(output)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sparsecod analyze: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not output.exists()


def test_different_sequences_are_not_compared(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in "01":
        arguments = [str(llama), "--data", str(text), *SIZES, "--scores", "skip", "--seed", seed]
        assert main(["analyze", *arguments, "--output", str(tmp_path / seed)]) == 0
    assert (
        main(["analyze", "--compare", str(tmp_path / "0"), str(tmp_path / "1"), "--output", str(tmp_path / "c")]) == 2
    )
    assert "measured on different sequences (seed 0 and 1)" in capsys.readouterr().err
