"""The global batch of each step, as a function of the samples consumed before it: what a resumed run needs to know."""

from __future__ import annotations

from sparsecod_megatron.config import TrainConfig, batch_sizes


def global_batch_size(train: TrainConfig, consumed_samples: int) -> int:
    """Sequences of the step that comes after `consumed_samples`.

    With a ramp, the samples of `rampup_batch_size` are divided evenly among the sizes below `global_batch_size`; a step
    takes the size that belongs to its first sample.

    Args:
        train: the section of a checked run.
        consumed_samples: over all ranks, since the start of the run.

    Source: Megatron-Core num_microbatches_calculator.py, RampupBatchsizeNumMicroBatchesCalculator.
    """
    sizes = batch_sizes(train)
    if train.rampup_batch_size is None or len(sizes) == 1:
        return train.global_batch_size
    samples_per_size = train.rampup_batch_size[2] / (len(sizes) - 1)
    return sizes[min(int(consumed_samples / samples_per_size), len(sizes) - 1)]


def samples_of_steps(train: TrainConfig, steps: int, consumed_samples: int = 0) -> int:
    """Sequences of the `steps` steps that come after `consumed_samples`, together."""
    samples = 0
    for step in range(steps):
        size = global_batch_size(train, consumed_samples + samples)
        if size == train.global_batch_size:
            return samples + (steps - step) * size
        samples += size
    return samples
