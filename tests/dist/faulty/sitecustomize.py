"""Lets a test make a real rank fail in the middle of what it does: SIGALRM raises in its main thread.

Python imports this module at its start where the folder is in PYTHONPATH.
"""

from __future__ import annotations

import signal
from types import FrameType


def _fail(number: int, frame: FrameType | None) -> None:
    raise RuntimeError("broken on purpose")


signal.signal(signal.SIGALRM, _fail)
