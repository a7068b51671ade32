"""How long tests wait for a command: a multiple of what commands have taken so far, on a machine that may be busy."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

AT_FIRST_S = 30.0
"""What a command is taken to need before one has ended."""
MULTIPLE = 20


class Pace:
    """Of this machine, in this session, as its slowest command shows it."""

    def __init__(self) -> None:
        self._slowest_s = AT_FIRST_S

    @property
    def patience_s(self) -> float:
        """Longest that anything is waited for."""
        return MULTIPLE * self._slowest_s

    @contextlib.contextmanager
    def measuring(self) -> Iterator[None]:
        """The block does what a command does; one that raises tells nothing."""
        began = time.monotonic()
        yield
        self._slowest_s = max(self._slowest_s, time.monotonic() - began)


PACE = Pace()
