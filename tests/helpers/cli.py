"""Commands in a process of their own, exactly as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def sparsecod(*arguments: str | Path, check: bool = True, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run `sparsecod ARGUMENTS`.

    Args:
        arguments: the command line.
        check: fail, showing the output, unless the exit status is 0.
        timeout_s: after this long the command is killed.
    """
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "RANK", "WORLD"))
    }
    result = subprocess.run(
        [sys.executable, "-m", "sparsecod_megatron", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert not check or result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def torchrun(
    script: Path, *arguments: str | Path, nproc: int, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """Run a worker script as `nproc` ranks; fails, showing the output, unless all exit with 0."""
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={nproc}",
            str(script),
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # workers import from tests
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    return result


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
