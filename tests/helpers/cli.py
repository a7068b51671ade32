"""Commands in processes of their own.

Importing torch and Megatron-Core takes seconds; one server imports them once and forks a process for every command and
rank. What torchrun itself does is the matter of the tests that start it: faults, stops, two agents, the quickstart.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.helpers.pace import PACE

ROOT = Path(__file__).resolve().parents[2]
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["tests.helpers.imported"])
INHERITED = ("TORCHELASTIC", "RANK", "WORLD", "LOCAL_RANK", "MASTER")
"""What a command must not find in its environment: it would take itself for a rank of something else."""


class Started:
    """A forked process and what it prints.

    Args:
        action: given the arguments, returns the exit status.
        arguments: of the command.
        environment: added to this process's.
        folder: for the output.
    """

    def __init__(
        self, action: Callable[[list[str]], int], arguments: list[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self.arguments = arguments
        self._stdout, self.log = folder / "stdout", folder / "stderr"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(INHERITED)}
        task = (action, arguments, inherited | dict(environment), Path.cwd(), self._stdout, self.log)
        self.process: ForkServerProcess = FORK_SERVER.Process(target=_be, args=task)
        self.process.start()

    def poll(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.exitcode

    def result(self) -> subprocess.CompletedProcess[str]:
        """Of a process that has ended."""
        assert self.process.exitcode is not None
        stdout, stderr = (path.read_text() if path.exists() else "" for path in (self._stdout, self.log))
        return subprocess.CompletedProcess(self.arguments, self.process.exitcode, stdout, stderr)


def _be(
    action: Callable[[list[str]], int],
    arguments: list[str],
    environment: dict[str, str],
    folder: Path,
    stdout: Path,
    stderr: Path,
) -> None:
    """Be the process of one command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in ((1, stdout), (2, stderr)):
        with path.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        sys.exit(action(arguments))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()


def _sparsecod(arguments: list[str]) -> int:
    from sparsecod_megatron.cli.main import main

    return main(arguments)


def _script(arguments: list[str]) -> int:
    """Call the script's `main`.

    Not as `__main__`: Megatron-Core's checkpoint writer starts a process that imports `__main__` again, which for a
    worker is torch and Megatron-Core, seconds on every rank.
    """
    sys.argv = arguments
    return runpy.run_path(arguments[0], run_name="worker")["main"]() or 0


def sparsecod(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `sparsecod ARGUMENTS`.

    Args:
        arguments: the command line.
        check: fail, showing the output, unless the exit status is 0.
    """
    return _run(_sparsecod, [*map(str, arguments)], [{}], check=check)


def sparsecod_ranks(*arguments: str | Path, nproc: int, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `sparsecod ARGUMENTS` as `nproc` ranks; the result is that of the first to fail, or else of the first.

    Args:
        arguments: the command line.
        nproc: number of ranks.
        check: fail, showing the output, unless all exit with 0.
    """
    return _run(_sparsecod, [*map(str, arguments)], _ranks(nproc), check=check)


@contextlib.contextmanager
def running_ranks(*arguments: str | Path, nproc: int) -> Iterator[list[Started]]:
    """`sparsecod ARGUMENTS` as `nproc` ranks that nobody watches, while the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        started = _start(_sparsecod, [*map(str, arguments)], _ranks(nproc), Path(folder))
        try:
            yield started
        finally:
            for each in started:
                each.process.kill()
                each.process.join()


def script(path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a script; its `main` gives the exit status."""
    return _run(_script, [*map(str, (path, *arguments))], [{}], check=False)


def script_ranks(script: Path, *arguments: str | Path, nproc: int) -> subprocess.CompletedProcess[str]:
    """Run a worker script as `nproc` ranks; fails, showing the output, unless all exit with 0."""
    return _run(_script, [*map(str, (script, *arguments))], _ranks(nproc), check=True)


def free_port() -> int:
    """One on loopback that nobody listens at."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _ranks(nproc: int) -> list[dict[str, str]]:
    """What torchrun tells each of its ranks, and a store that the first one holds."""
    port = free_port()
    shared = {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc), "MASTER_ADDR": "127.0.0.1"}
    return [shared | {"MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(nproc)]


def _run(
    action: Callable[[list[str]], int],
    arguments: list[str],
    environments: list[dict[str, str]],
    *,
    check: bool,
) -> subprocess.CompletedProcess[str]:
    """Processes side by side; the result is that of the first to fail, or else of the first."""
    patience_s = PACE.patience_s
    with tempfile.TemporaryDirectory() as folder, PACE.measuring():
        started = _start(action, arguments, environments, Path(folder))
        failed = _first_to_fail(started, time.monotonic() + patience_s)
        result = (failed or started[0]).result()
    assert result.returncode >= 0 or failed is None, f"killed, or no end in {patience_s:.0f} s\n{result.stderr[-8000:]}"
    text = f"exit {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}"
    assert not check or result.returncode == 0, text
    return result


def _start(
    action: Callable[[list[str]], int], arguments: list[str], environments: list[dict[str, str]], folder: Path
) -> list[Started]:
    started = []
    for rank, environment in enumerate(environments):
        own = folder / str(rank)
        own.mkdir()
        started.append(Started(action, arguments, environment, own))
    return started


def _first_to_fail(started: list[Started], deadline: float) -> Started | None:
    """Wait for all; where one fails or time is up, the others are killed."""
    while True:
        running = [each for each in started if each.process.exitcode is None]
        # After that look, so that one which fails between two looks is not taken for one that ended well.
        failed = next((each for each in started if each.process.exitcode), None)
        if failed is not None or not running:
            break
        if time.monotonic() > deadline:
            failed = running[0]
            break
        multiprocessing.connection.wait([each.process.sentinel for each in running], timeout=0.05)
    for each in started:
        if failed is not None:
            each.process.kill()
        each.process.join()
    return failed


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
