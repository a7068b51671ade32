"""Three processes that share work: all of them get all of it, in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.cli import script_ranks

pytestmark = pytest.mark.dist


def test_everybody_gets_everything_in_order(repo_root: Path, tmp_path: Path) -> None:
    script_ranks(repo_root / "tests" / "dist" / "processes_worker.py", tmp_path, nproc=3)
    for rank in range(3):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "size": 3,
            "is_first": rank == 0,
            "no_progress": None if rank == 0 else True,
            "gathered": [[1, 0], [2, 0], [2, 1]],
            "dealt": [[part % 3, part] for part in range(7)],
            "total": [3.0, 3.0],
            "from_first": "by 0",
            "agreed": ["output", "output"],
        }
