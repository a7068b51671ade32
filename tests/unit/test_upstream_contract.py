"""What is taken from Megatron-Core, torch, transformers and ModelOpt is what tools/upstream_contract.txt records."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the list is of a machine without CUDA's packages")
def test_upstream_is_as_recorded(repo_root: Path) -> None:
    """In a process of its own: here the CPU backend may have replaced some of it."""
    command = [sys.executable, "tools/upstream_contract.py"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"look at each, then run {' '.join(command[1:])} --write:\n{done.stdout}{done.stderr}"


def test_a_difference_names_what_broke(repo_root: Path) -> None:
    differences = runpy.run_path(str(repo_root / "tools" / "upstream_contract.py"))["differences"]
    recorded = ["a.f(x, y=1)", "a.g()", "a.h(z)", "attribute _p: a"]
    found = ["a.f(x, *, y=2)", "a.g: missing (a.g)", "a.h(z)", "attribute _p: missing"]
    assert list(differences(recorded, found)) == [
        "a.f: - y=1, + *, + y=2",
        "a.g()  ->  a.g: missing (a.g)",
        "attribute _p: a  ->  attribute _p: missing",
    ]
