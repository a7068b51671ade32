"""Turns a request to stop (Ctrl-C, Slurm's preemption) into a flag that the loop reads between steps.

A second request, more than a moment after the first, ends the process at once, as if nothing handled the signal. Within
that moment it counts as the same one: `timeout` and some schedulers signal a process and then its whole group.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

from sparsecod_megatron.config.stop_signals import handling_stop_signals

REQUEST_WINDOW_S = 1.0


class StopRequest:
    """Whether this process was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.since = 0.0

    def __bool__(self) -> bool:
        return self.signal is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, a stop signal sets the flag instead of ending the process; a later one ends it. Local."""
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if request and now - request.since > REQUEST_WINDOW_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not request:
            request.signal, request.since = signal.Signals(number), now

    with handling_stop_signals(note):
        yield request
