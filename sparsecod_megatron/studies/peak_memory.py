"""The most memory that a piece of work held at one time, on the device that computes."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What Linux takes as the wish to forget the highest resident set so far."""


@dataclass
class Peak:
    """Bytes: of the process's resident set on a CPU, of allocated device memory on CUDA; 0 until the work ends."""

    num_bytes: int = 0


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure what runs inside. Where the system cannot forget earlier work, its peak is in the number.

    Args:
        device: where it computes.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            _RESET.write_text(_RESET_PEAK)
    yield peak
    if device.type == "cuda":
        peak.num_bytes = torch.cuda.max_memory_allocated(device)
        return
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    kibibytes = int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak.num_bytes = 1024 * kibibytes
