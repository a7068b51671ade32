"""Commands in processes of their own.

Importing torch and Megatron-Core takes seconds; one server imports them once and forks a process for every command.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.helpers.imported"])


def sparsecod(*arguments: str | Path, check: bool = True, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    """Run `sparsecod ARGUMENTS` in a process of its own, forked from one that has imported the libraries already.

    Args:
        arguments: the command line.
        check: fail, showing the output, unless the exit status is 0.
        timeout_s: after this long the command is killed.
    """
    command = [*map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = FORK_SERVER.Process(target=run_command, args=(command, _environment(), Path.cwd(), stdout, stderr))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout_s, stdout.read_text(), stderr.read_text())
        result = subprocess.CompletedProcess(command, process.exitcode, stdout.read_text(), stderr.read_text())
    assert not check or result.returncode == 0, f"exit {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def run_command(command: list[str], environment: dict[str, str], folder: Path, stdout: Path, stderr: Path) -> None:
    """Be the process of one command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        with path.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    from sparsecod_megatron.cli.main import main

    try:
        sys.exit(main(command))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "RANK", "WORLD"))}


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
