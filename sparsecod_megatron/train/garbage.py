"""Garbage is collected on all ranks in the same step.

Python does it whenever enough objects were made, on each rank at another time, and looks through every object of the
model: hundreds of milliseconds in which all other ranks wait in a collective.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def collected_in_step(interval: int) -> Iterator[Callable[[int], None]]:
    """Take garbage collection over from Python while the block runs; what exists when it begins is never scanned.

    Args:
        interval: steps between collections; 0 changes nothing.

    Yields:
        To be called with each step, on all ranks alike.
    """
    if interval == 0:
        yield lambda step: None
        return
    freezes = gc.get_freeze_count() == 0  # whoever has frozen before takes back what is then all of it
    gc.collect()
    if freezes:
        gc.freeze()
    gc.disable()
    try:
        yield lambda step: _collect(step, interval)
    finally:
        gc.enable()
        if freezes:
            gc.unfreeze()


def _collect(step: int, interval: int) -> None:
    if step % interval == 0:
        gc.collect()
