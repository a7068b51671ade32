"""Uneven splits, which gloo does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.cli import script_ranks

pytestmark = pytest.mark.dist


def test_uneven_gather_and_reduce_scatter(repo_root: Path) -> None:
    script_ranks(repo_root / "tests" / "dist" / "uneven_worker.py", nproc=3)
