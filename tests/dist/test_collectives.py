"""Uneven splits, which gloo does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.dist.uneven_worker import SPLITS, pieces
from tests.helpers.cli import script_ranks

pytestmark = pytest.mark.dist


def test_uneven_gather_and_reduce_scatter(repo_root: Path, tmp_path: Path) -> None:
    """Each is the other's gradient: a gather's sums the three ranks' weights 1, 2 and 3."""
    script_ranks(repo_root / "tests" / "dist" / "uneven_worker.py", tmp_path, nproc=3)
    scattered = torch.split(torch.arange(14.0).view(7, 2) * (1 + 2 + 3), SPLITS)
    for rank, rows in enumerate(SPLITS):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == {
            "gathered": torch.cat(pieces()).tolist(),
            "gathered_from": [[6.0, 6.0]] * rows,
            "scattered": scattered[rank].tolist(),
            "scattered_from": [[1.0, 1.0]] * sum(SPLITS),
        }
