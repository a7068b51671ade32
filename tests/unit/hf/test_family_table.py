"""The table of docs/HUGGINGFACE.md says what really works with a model of each family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.family_table import BEGIN, END, OPEN, row, section

WRITE = "bash tools/run_in_venv.sh python tools/family_table.py --write"


@pytest.fixture(scope="module")
def written(repo_root: Path) -> str:
    """The section in the page."""
    page = (repo_root / "docs" / "HUGGINGFACE.md").read_text(encoding="utf-8")
    return page.partition(BEGIN)[2].partition(END)[0]


@pytest.mark.parametrize("kind", OPEN)
def test_row(kind: str, written: str) -> None:
    assert row(kind) in written.splitlines(), WRITE


def test_nothing_else_is_said(written: str) -> None:
    """Reasons, and families that are gone."""
    assert written == section(), WRITE
