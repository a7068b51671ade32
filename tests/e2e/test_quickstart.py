"""The quickstart's own script, shortened, in a folder of its own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


@pytest.mark.timeout(900)
def test_quickstart(repo_root: Path, tmp_path: Path) -> None:
    """Everything it promises to leave behind is there, and it says by how much the losses fell."""
    output = tmp_path / "quickstart"
    result = subprocess.run(
        ["bash", str(repo_root / "examples" / "quickstart.sh"), str(output)],
        env=os.environ | {"STEPS": "6", "DOCUMENTS": "400", "QUESTIONS": "20"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-4000:]}"
    for name in ("dense", "moe"):
        run = output / name
        assert (run / "checkpoints" / "latest").read_text() == "step_00000006\n"
        assert "resumed from" in (run / "log.txt").read_text() + result.stderr
        assert (output / f"{name}-hf" / "model.safetensors").exists()
        assert "true_continuation" in (output / f"{name}-eval" / "results.md").read_text()
        assert f"{name}: loss" in result.stdout
    assert result.stdout.count("argmax agreement 100.00%") == 4  # two exports; random and greedy tokens
    for name in ("variance_by_depth.png", "report.html"):
        assert (output / name).stat().st_size > 10_000
