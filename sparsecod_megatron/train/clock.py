"""The time of training steps, without making the host wait for a GPU that it has run ahead of."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class StepClock:
    """Measures laps: from one step's verdict to the next, without the time in `paused` blocks.

    A lap holds one update: on CUDA the one before, which the device still computes when the host begins the next step
    and which the host waits for at its verdict. So laps add up to the whole time of training.

    Args:
        device: device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the lap before, or since the clock was made; begins the next."""
        now = time.perf_counter()
        seconds, self._began = now - self._began, now
        return seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block out of the lap; waits for the device before it and after it."""
        synchronize(self._device)
        began = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self._device)
            self._began += time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told; a CPU has. Local."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
