"""docs/RESULTS.md shows what the kept studies hold, all of it, and every claim that their files make."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from sparsecod_megatron.cli.main import main
from tests.helpers.results_page import (
    KEPT,
    PAGE,
    SECTION,
    STUDIES,
    TABLE,
    VOCAB_SIZE,
    kept_studies,
    kept_study,
    updated,
)

WRITE = "bash tools/run_in_venv.sh python tools/results_tables.py"


@pytest.fixture(scope="module")
def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def test_tables_are_those_of_the_kept_results(page: str) -> None:
    assert updated(page) == page, WRITE


@pytest.mark.parametrize("name", kept_studies())
def test_every_claim_is_shown(name: str, page: str) -> None:
    study, table = kept_study(name)
    assert len(table.verdicts) == len(study.config.claims)
    shown = [line for found in SECTION.finditer(page) for text in TABLE.findall(found[0]) for line in text.splitlines()]
    for verdict in table.verdicts:
        assert any(line.startswith(f"| {verdict.claim.text} |") and verdict.verdict in line for line in shown)


def test_a_number_that_is_not_kept_is_found(page: str) -> None:
    changed = page.replace("**supported**", "**not supported**", 1)
    assert changed != page and updated(changed) == page


def test_the_command_makes_the_tables_from_what_is_kept(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(STUDIES.parents[2])
    command = next(line.strip() for line in page.splitlines() if "--kept" in line)
    arguments = shlex.split(command)[1:-1]
    assert f"run.model.vocab_size={VOCAB_SIZE}" in arguments and (KEPT / "init.json").samefile(arguments[-2])
    assert main([*arguments, str(tmp_path)]) == 0
    for table in TABLE.findall((tmp_path / "table.md").read_text(encoding="utf-8")):
        assert table in page
    assert "variance by depth is drawn from the runs, which are not kept" in capsys.readouterr().out


def test_kept_cells_are_not_mixed_with_taken_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "study",
        str(STUDIES / "init.yaml"),
        "--kept",
        str(KEPT / "init.json"),
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, "--reuse", str(tmp_path)]) == 2
    assert "leave one out" in capsys.readouterr().err and not (tmp_path / "out").exists()
