"""Refuses policies for spikes and divergence that could never act."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config.schema import RunConfig

MIN_WINDOW = 8
"""Below this many values a median absolute deviation is mostly chance."""


def fault_problems(config: RunConfig) -> Iterator[str]:
    """One line for each problem of the keys about spikes and divergence."""
    train = config.train
    if 0 < train.spike_window < MIN_WINDOW:
        yield f"train.spike_window: {train.spike_window} steps are too few; use at least {MIN_WINDOW}, or 0"
    if train.spike_skip and train.spike_window == 0:
        yield "train.spike_skip: true, but train.spike_window=0 looks for none; set a window, or spike_skip=false"
    if train.on_divergence == "rollback" and config.checkpoint.save_interval == 0:
        yield (
            "train.on_divergence: 'rollback' has no checkpoint to go back to under checkpoint.save_interval=0; "
            "set an interval, or on_divergence=skip"
        )
