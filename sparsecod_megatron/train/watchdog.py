"""Ends a process whose step does not end, saying which phase of which step hangs and where every thread stands.

A collective that some rank never joins waits for the process group's timeout, and then names neither. Exiting lets the
launcher restart the ranks from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger("sparsecod")

STATUS_OF_HANG = 3
"""Exit status of a process that gave up on a step."""
GRACE_S = 2.0
"""Between the report and the exit, in which the other ranks, stuck since about the same time, write theirs."""


class _Phase(NamedTuple):
    """What the process is doing."""

    step: int
    name: str
    began: float
    timeout_s: float
    key: str


class Watchdog:
    """Watches the phases that the loop announces.

    Args:
        timeout_s: longest that a phase may take that has no limit of its own; 0 watches nothing.
        log_path: stacks of all threads are appended to it.
        rank: rank of this process.
        give_up: ends the process with a status.
    """

    def __init__(
        self, *, timeout_s: float, log_path: Path, rank: int, give_up: Callable[[int], object] = os._exit
    ) -> None:
        self._timeout_s, self._log_path, self._rank, self._give_up = timeout_s, log_path, rank, give_up
        # One tuple, replaced whole, so that the thread never sees half of it.
        self.enter(0, "start")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs. Local."""
        if self._timeout_s == 0:
            yield
            return
        self.enter(0, "start")
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def enter(
        self, step: int, phase: str, *, timeout_s: float | None = None, key: str = "train.step_timeout_s"
    ) -> None:
        """Say that `phase` of `step` begins, and the one before has ended. Local.

        Args:
            step: the step.
            phase: what begins.
            timeout_s: longest that it may take; None is the watchdog's own limit.
            key: key of the configuration, where that limit is set.
        """
        limit = self._timeout_s if timeout_s is None else timeout_s
        self._current = _Phase(step, phase, time.monotonic(), limit, key)

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(min(1.0, self._timeout_s / 4)):
            phase = self._current
            if time.monotonic() - phase.began > phase.timeout_s:
                self._report(phase)
                if not ended.wait(GRACE_S):
                    self._give_up(STATUS_OF_HANG)
                return

    def _report(self, phase: _Phase) -> None:
        logger.critical(
            "rank %d: step %d: %s has not ended after %g s (%s); stacks of all threads are in %s",
            *(self._rank, phase.step, phase.name, phase.timeout_s, phase.key, self._log_path),
        )
        try:
            with self._log_path.open("a", encoding="utf-8") as log:
                log.write(f"rank {self._rank}, step {phase.step}, {phase.name}:\n")
                log.flush()
                faulthandler.dump_traceback(file=log, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
