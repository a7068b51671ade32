"""Where the time of three steps of dense-1B goes: top kernels, idle time of the card, host synchronisations."""

from __future__ import annotations

import collections
import time
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tests.helpers.training import trainer_batches
from tools.gpu_bring_up.bench import Bench
from tools.gpu_bring_up.trainers import large_config, timed_steps, trainer_of

STEPS, WARM_UP = 3, 3
PROFILE_FILE = "profile.txt"
SYNCHRONISATIONS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::item",
    "aten::nonzero",
)
"""Calls in which the host waits; items and index lists end in one of the first three, and say where from."""
ROWS = 40


def run(bench: Bench) -> None:
    """Profile, keep the tables, and say the totals."""
    config = large_config(bench.cuda)
    with bench.check("dense-1B: profile of three steps") as found:
        with trainer_of(config, transformer_engine=bench.transformer_engine) as trainer:
            data = trainer_batches(trainer)
            list(timed_steps(trainer, data, WARM_UP))
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.cuda else [])]
            began = time.perf_counter()
            with profile(activities=activities) as record:
                list(timed_steps(trainer, data, STEPS))
            seconds = time.perf_counter() - began
        averages = record.key_averages()
        by = "self_device_time_total" if bench.cuda else "self_cpu_time_total"
        text = averages.table(sort_by=by, row_limit=ROWS, max_name_column_width=100)
        (bench.output / PROFILE_FILE).write_text(text + "\n", encoding="utf-8")
        calls = {event.key: event.count / STEPS for event in averages if event.key in SYNCHRONISATIONS}
        top = _top(averages, by)
        found.values = {"calls_per_step": calls, "top": top, "wall_s": seconds}
        waits = ", ".join(f"{count:.0f} {name}" for name, count in calls.items()) or "none"
        found.figure = f"host waits per step: {waits}; most time in {next(iter(top))[:60]}"
        busy = _busy_seconds(record, bench.device) / seconds
        found.values["busy"] = busy
        found.figure = f"{bench.device} busy {busy:.0%}; {found.figure}"
        assert top, "the profile is empty"


def _top(averages: Any, by: str) -> dict[str, float]:
    """Seconds of the ten largest, by name."""
    seconds = collections.Counter({event.key: getattr(event, by) / 1e6 for event in averages})
    return dict(seconds.most_common(10))


def _busy_seconds(record: Any, device: str) -> float:
    """Time in which at least one kernel or copy ran (without a card: an operation of the host)."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in record.events()
        if event.device_type.name == device.upper() and not event.is_user_annotation
    )
    busy, until = 0.0, float("-inf")
    for start, end in spans:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e6
