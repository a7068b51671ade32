"""Every checkpoint of a run, and a row of models, as one analysis: what it holds, what it adds, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecod_megatron.analysis.compare import compare
from sparsecod_megatron.checkpoint.state import TrainState
from sparsecod_megatron.cli.analysis_series import revision_number, revision_tokens
from sparsecod_megatron.cli.main import main
from tests.helpers.words import save_with_words, write_words
from tests.unit.analysis.scores.families import VOCAB_SIZE, tiny
from tests.unit.analysis.test_report import Page
from tests.unit.checkpoint.test_stream import write
from tests.unit.compression.models import tiny as tiny_of_run

OPTIONS = ["--samples", "6", "--seq-length", "12", "--device", "cpu", "--scores", "skip,lens", "--every-checkpoint"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("text") / "held_out.txt", VOCAB_SIZE, 2000)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three of one shape, further and further from the first."""
    folder, found = tmp_path_factory.mktemp("models"), []
    for place in range(3):
        model = tiny("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 1 + 0.3 * place
        found.append(save_with_words(model, folder / f"model{place}"))
    return found


def scores(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((path / "scores.json").read_text(encoding="utf-8"))
    return content


def test_models_one_after_another(
    models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "series"
    command = ["--data", str(text), *OPTIONS, "--output", str(output)]
    assert main(["analyze", *map(str, models[:2]), *command]) == 0
    names = ["001_model0", "002_model1"]
    measured = {name: (output / name / "scores.json").stat().st_mtime_ns for name in names}

    assert main(["analyze", *map(str, models), *command]) == 0, "with one model more"
    names.append("003_model2")
    assert {name: (output / name / "scores.json").stat().st_mtime_ns for name in names[:2]} == measured
    whole, parts = scores(output), [scores(output / name) for name in names]
    assert [point["name"] for point in whole["settings"]["points"]] == names
    rows = [row for row in whole["scores"]["skip"]["tables"]["skip"] if row["name"] == "skip_loss"]
    assert [(row["model"], row["value"], row["low"], row["high"]) for row in rows] == [
        (place, *(part["scores"]["skip"]["values"]["skip_loss"][end] for end in ("value", "low", "high")))
        for place, part in enumerate(parts, start=1)
    ]
    assert whole["scores"]["skip"]["values"] == parts[-1]["scores"]["skip"]["values"]

    changes = {(row["from"], row["to"], row["name"]): row for row in whole["scores"]["skip"]["tables"]["skip_changes"]}
    expected = [row for row in compare(output / names[1], output / names[2]) if row.score == "skip"]
    assert len(expected) and len(changes) == 2 * len(expected)
    for difference in expected:
        row = changes[2, 3, difference.name]
        assert (row["difference"], row["low"]) == (difference.difference, difference.low)
    shown = capsys.readouterr().out
    separated = [row for row in expected if row.separated]
    assert separated and all(f"{row.name:32} {row.difference:+.4g} [" in shown for row in separated)

    assert main(["report", str(output), "--output", str(tmp_path / "page.html")]) == 0
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    figures = {figure["name"]: figure for figure in page.data["analyses"][0]["figures"]}
    curve = figures["skip_skip_loss_by_model"]
    assert curve["x"] == [1, 2, 3] and list(curve["series"]) == ["skip_loss", "95 % from", "95 % to"]
    assert curve["series"]["95 % to"] == pytest.approx([row["high"] for row in rows], rel=1e-5)
    assert (output / "plots/skip_skip_loss_by_model.png").is_file() and (output / "skip_changes.csv").is_file()


@pytest.mark.parametrize(
    ("name", "number", "tokens"),
    [
        ("stage1-step721901-tokens6056B", 721901, 6_056_000_000_000),
        ("stage1-step25-tokens51K", 25, 51_000),
        ("step-40-tokens-81920", 40, 81920),
        ("step1000", 1000, None),
        ("step_00000020", 20, None),
        ("step512-seed3", 512, None),
        ("final-50", 50, None),
        ("main", None, None),
    ],
)
def test_what_a_revisions_name_tells(name: str, number: int | None, tokens: int | None) -> None:
    assert (revision_number(name), revision_tokens(name)) == (number, tokens)


def test_a_folder_of_revisions(
    models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the steps of their names, OLMo's here; one that comes later is measured alone, in its place."""
    folder, output = tmp_path / "revisions", tmp_path / "series"
    early, late, between = "stage1-step9-tokens1B", "stage1-step100-tokens3B", "stage1-step50-tokens1B"
    for name, model in ((early, models[0]), (late, models[2])):
        shutil.copytree(model, folder / name)
    (folder / "notes").mkdir()
    command = ["analyze", str(folder), "--data", str(text), *OPTIONS, "--output", str(output)]
    assert main(command) == 0
    before = (output / early / "scores.json").stat().st_mtime_ns
    shutil.copytree(models[1], folder / between)
    assert main(command) == 0
    whole = scores(output)
    assert whole["settings"]["axis"] == "revision" and (output / early / "scores.json").stat().st_mtime_ns == before
    rows = [row for row in whole["scores"]["skip"]["tables"]["skip"] if row["name"] == "skip_loss"]
    expected = [scores(output / name)["scores"]["skip"]["values"]["skip_loss"] for name in (early, between, late)]
    assert [(row["revision"], row["tokens"]) for row in rows] == [(9, 10**9), (50, 10**9), (100, 3 * 10**9)]
    assert [(row["value"], row["low"], row["high"]) for row in rows] == [tuple(value.values()) for value in expected]
    changes = whole["scores"]["skip"]["tables"]["skip_changes"]
    assert {(row["from"], row["to"]) for row in changes} == {(9, 50), (50, 100)}
    (folder / "notes").rename(folder / "final-50")
    shutil.copy(models[0] / "config.json", folder / "final-50")
    assert main(command) == 2
    assert f"{between} has no number of its own" in capsys.readouterr().err
    (folder / "final-50").rename(folder / "stage2-ingredient1-step9-tokens1B")
    assert main(command) == 2
    assert "has revisions of stage1 and stage2, whose steps each begin at 0" in capsys.readouterr().err


def test_every_checkpoint_of_a_run(text: Path, tmp_path: Path) -> None:
    """By step, with the tokens seen; what a run has removed stays, and what it has saved since is added."""
    words = save_with_words(tiny_of_run("llama"), tmp_path / "words")
    run, output = tmp_path / "run", tmp_path / "series"
    (run / "tokenizer").mkdir(parents=True)
    for file in words.glob("tokenizer*"):
        shutil.copy(file, run / "tokenizer")
    later, _ = write(run / "checkpoints", "model.vocab_size=67", state=TrainState(step=20, consumed_tokens=640))
    command = ["analyze", str(run), "--data", str(text), *OPTIONS, "--no-verify", "--output", str(output)]
    assert main(command) == 0
    assert scores(output)["scores"]["skip"]["tables"].keys() == {"skip"}, "one point has no changes"

    last = later.with_name("step_00000030")
    later.rename(last)
    (run / "checkpoints" / "latest").write_text(last.name + "\n")
    assert main(command) == 0
    points = scores(output)["settings"]["points"]
    assert [(point["name"], point["place"], point["tokens"]) for point in points] == [
        ("step_00000020", 20, 640),
        ("step_00000030", 30, 640),
    ]
    change = scores(output)["scores"]["skip"]["tables"]["skip_changes"][0]
    assert (change["from"], change["to"], change["difference"], change["separated"]) == (20, 30, 0, False)


def test_refused(models: list[Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "series"
    command = ["--data", str(text), *OPTIONS, "--output", str(output)]
    pair = [str(path) for path in models[:2]]

    def said(*arguments: str) -> str:
        assert main(["analyze", *arguments]) == 2
        (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("sparsecod analyze: ")]
        return line

    (tmp_path / "empty").mkdir()
    assert "no checkpoints/step_… in it, and no folders of models" in said(str(tmp_path / "empty"), *command)
    assert "leave --compare and update out" in said(*pair, *command, "--scores", "update")
    assert "only --every-checkpoint and --scores update take several" in said(
        *pair, *[word for word in command if word != "--every-checkpoint"]
    )
    assert not output.exists()
    assert main(["analyze", *pair, *command]) == 0
    assert "was measured with seed 0, not 1" in said(*pair, *command, "--seed", "1")
    assert f"001_model0: is of {pair[0]}, not {pair[1]}" in said(*reversed(pair), *command)
    assert "holds an analysis of one model" in said(*pair, *command[:-1], str(output / "001_model0"))
