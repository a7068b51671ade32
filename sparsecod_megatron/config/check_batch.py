"""The sizes that the global batch takes in a run, and whether the processes can share each of them.

A ramp changes the batch long after the start, so all of its sizes are checked before it.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config.schema import ParallelConfig, TrainConfig


def batch_sizes(train: TrainConfig) -> list[int]:
    """Every global batch size of the run, in order; the last is `global_batch_size`."""
    if train.rampup_batch_size is None:
        return [train.global_batch_size]
    start, increment, _ = train.rampup_batch_size
    return list(range(start, train.global_batch_size + 1, increment))


def ramp_problems(train: TrainConfig) -> Iterator[str]:
    """One line for each problem of `train.rampup_batch_size`."""
    key = "train.rampup_batch_size"
    ramp = train.rampup_batch_size
    if ramp is None:
        return
    if len(ramp) != 3 or min(ramp) < 1:
        yield f"{key}: {ramp} is not three positive numbers; give [start, increment, samples]"
        return
    start, increment, _ = ramp
    if start > train.global_batch_size:
        yield f"{key}: starts at {start}, above train.global_batch_size={train.global_batch_size}; lower the start"
    elif (train.global_batch_size - start) % increment:
        yield (
            f"{key}: steps of {increment} from {start} do not reach train.global_batch_size="
            f"{train.global_batch_size}; change one of them"
        )


def division_problems(train: TrainConfig, parallel: ParallelConfig, data_parallel_size: int) -> Iterator[str]:
    """One line for each batch size that `data_parallel_size` replicas cannot share."""
    step = train.micro_batch_size * data_parallel_size
    stages = parallel.pipeline_model_parallel_size
    for size in batch_sizes(train):
        last = size == train.global_batch_size
        key = f"train.global_batch_size: {size}" if last else f"train.rampup_batch_size: its size {size}"
        if size % step:
            yield (
                f"{key} is not a multiple of micro_batch_size × data-parallel size = {train.micro_batch_size} × "
                f"{data_parallel_size}; use a multiple of {step}"
            )
        elif parallel.virtual_pipeline_model_parallel_size is not None and size // step % stages:
            yield (
                f"{key} gives {size // step} micro-batches a step, but the interleaved schedule needs a multiple of "
                f"parallel.pipeline_model_parallel_size={stages}; change it or train.micro_batch_size"
            )
