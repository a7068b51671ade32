"""Processes with a time-out and a log: fresh ones, or, in a rehearsal, forks that have everything imported already.

On a card every process is fresh, because what CUDA has set up does not survive a fork. A rehearsal starts a dozen of
them on a core or two, where importing torch and Megatron-Core each time would take longer than all else.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def fresh(
    arguments: list[str], *, environment: Mapping[str, str], log: Path, timeout_s: float, own_group: bool
) -> int | None:
    """Run `python3 ARGUMENTS`.

    Args:
        arguments: of the interpreter.
        environment: the whole of it.
        log: file that takes what it prints.
        timeout_s: after which it is killed.
        own_group: with all that it started; without, what it started belongs to the caller's group.

    Returns:
        Its exit status; None if it was killed.
    """
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=own_group,
        )
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _kill(process.pid, own_group)
            process.wait()
            return None


def forked(
    action: Callable[..., Any],
    *arguments: Any,
    environment: Mapping[str, str],
    log: Path,
    timeout_s: float,
    own_group: bool,
) -> int | None:
    """Call a function in a fork of this process, which has never computed anything; else like `fresh`."""
    task = (action, arguments, dict(environment), log, own_group)
    process = multiprocessing.get_context("fork").Process(target=_be, args=task)
    process.start()
    process.join(timeout_s)
    if process.exitcode is None:
        assert process.pid is not None
        _kill(process.pid, own_group)
        process.join()
        return None
    return process.exitcode


def _be(
    action: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    log: Path,
    own_group: bool,
) -> None:
    if own_group:
        os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    try:
        sys.exit(action(*arguments))
    finally:
        sys.stdout.flush()


def _kill(pid: int, own_group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if own_group:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
