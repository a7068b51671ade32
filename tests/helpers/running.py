"""Commands that tests watch, signal and kill while they run."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.cli import Started
from tests.helpers.pace import PACE


@contextlib.contextmanager
def ended_with_block(process: subprocess.Popen[Any]) -> Iterator[None]:
    """The process does not outlive the block, nor does anything that it started."""
    try:
        yield
    finally:
        end(process)


def end(process: subprocess.Popen[Any]) -> None:
    """As when the power fails: the process and all that it started at once, nobody told; nothing if it has ended."""
    if process.poll() is None:
        started = psutil.Process(process.pid).children(recursive=True)
        for part in [process, *started]:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                part.kill()
    process.wait()


def until(condition: Callable[[], Any], process: subprocess.Popen[Any] | Started, *, log: Path | None = None) -> Any:
    """What the condition returns once it is true; fails where the process ends before, or patience does.

    Args:
        condition: looked at every few milliseconds.
        process: what it is waited for.
        log: file that the process writes to; without one its `log` or `stderr` is read once it has ended.
    """
    if isinstance(process, Started):
        log = process.log
    deadline = time.monotonic() + PACE.patience_s
    while not (value := condition()):
        has_ended = process.poll() is not None
        if has_ended or time.monotonic() > deadline:
            stream = getattr(process, "stderr", None)
            printed = log.read_text() if log else stream.read() if has_ended and stream else ""
            pytest.fail(f"{'ended early' if has_ended else 'waited in vain'}\n{printed[-4000:]}")
        time.sleep(0.002)
    return value
