"""docs/RESULTS.md shows what the kept studies hold, all of it, and every claim that their files make."""

from __future__ import annotations

import pytest

from tests.helpers.results_page import PAGE, SECTION, TABLE, kept_studies, kept_study, updated

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
