"""Shell scripts and the Dockerfile are what their linters call clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (".ci", "examples", "tests", "tools")


def scripts() -> list[Path]:
    """Files that a shell runs: by their first line."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in files if path.suffix != ".pyc" and path.read_bytes().startswith(b"#!/usr/bin/env bash")]


@pytest.mark.parametrize("linter", ["shellcheck", "hadolint"])
def test_clean(linter: str) -> None:
    files = scripts() if linter == "shellcheck" else [ROOT / "Dockerfile"]
    assert files
    command = [str(Path(sys.executable).parent / linter), *map(str, files)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
