"""Analyses in the report: what `analyze` found is what the page holds, alone or beside training runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparsecod_megatron.analysis.analyze import analyze, write_analysis
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.cli.main import main
from tests.unit.analysis.run_files import write_run
from tests.unit.analysis.scores.families import context, tiny
from tests.unit.analysis.test_report import Page


@pytest.fixture(scope="module")
def analyses(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("analyses")
    for family in ("llama", "gpt2"):
        found = analyze(
            context(tiny(family)), find_scores(["causal", "permutation", "usefulness", "lens"]), settings={}
        )
        write_analysis(found, folder / family)
    return [folder / "llama", folder / "gpt2"]


def report(paths: list[Path], output: Path) -> Page:
    assert main(["report", *map(str, paths), "--output", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8"))


def test_page_holds_the_scores_numbers(analyses: list[Path], tmp_path: Path) -> None:
    page = report(analyses, tmp_path / "page.html")
    assert page.texts["h1"] == "llama, gpt2" and page.data["runs"] == []
    written = json.loads((analyses[1] / "scores.json").read_text(encoding="utf-8"))["scores"]
    shown = page.data["analyses"][1]
    assert (shown["name"], dict(shown["facts"])["Architecture"]) == ("gpt2", "GPT2LMHeadModel")
    values = {(entry["score"], entry["name"]): entry for entry in shown["values"]}
    causal = written["causal"]["values"]["causal"]
    for end in ("value", "low", "high"):
        assert values["causal", "causal"][end] == pytest.approx(causal[end], rel=1e-5)
    figures = {figure["name"]: figure for figure in shown["figures"]}
    assert {figure["kind"] for figure in figures.values()} == {"heat_map", "bars", "lines"}
    for row in written["causal"]["tables"]["causal"]:
        assert figures["causal"]["values"][row["skipped"]][row["layer"]] == pytest.approx(row["causal"], rel=1e-5)
    bars = [row["usefulness"] for row in written["usefulness"]["tables"]["usefulness"]]
    assert figures["usefulness"]["values"] == pytest.approx(bars, rel=1e-5) and figures["usefulness"]["line"] == 1.1
    warnings = [{"score": name, "text": text} for name, score in written.items() for text in score["warnings"]]
    assert shown["warnings"] == warnings != []


def test_runs_and_analyses_in_one_page(analyses: list[Path], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    page = report([analyses[0], run, analyses[1]], tmp_path / "page.html")
    assert page.texts["h1"] == "run, llama, gpt2"
    names = [[part["name"] for part in page.data[kind]] for kind in ("runs", "analyses")]
    assert names == [["run"], ["llama", "gpt2"]]


@pytest.mark.parametrize(
    ("scores", "output", "message"),
    [
        ("{}", "page.html", "scores.json: has no settings and scores; analyse the model again"),
        ('{"settings": {}', "page.html", "scores.json: not JSON"),
        ('{"settings": {}, "scores": {"skip": {"figures": ["skip_loss"]}}}', "page.html", "score skip does not hold"),
        (None, "page.png", "the figure shows training runs, but"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    analyses: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scores: str | None,
    output: str,
    message: str,
) -> None:
    folder = analyses[0]
    if scores is not None:
        folder = tmp_path / "damaged"
        folder.mkdir()
        (folder / "scores.json").write_text(scores, encoding="utf-8")
    assert main(["report", str(folder), "--output", str(tmp_path / output)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not (tmp_path / output).exists()


def test_an_analysis_given_twice_is_refused(
    analyses: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(analyses[0]), str(analyses[0]), "--output", str(tmp_path / "page.html")]
    assert main(["report", *arguments]) == 2
    assert "given twice; name each analysis once" in capsys.readouterr().err
