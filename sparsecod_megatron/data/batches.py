"""Samples to micro-batches, so that a global batch is the same set of samples under any data-parallel size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from sparsecod_megatron.errors import ConfigError

_KEYS = ("tokens", "labels", "loss_mask", "position_ids")


class BatchIterator:
    """Yields one data-parallel rank's micro-batches.

    The global batch that follows `c` consumed samples is samples `[c, c + G(c))` of the dataset. Its micro-step `m` is
    the `m`-th `micro_batch_size · data_parallel_size` of them, and each rank takes a contiguous part of it. Iteration
    ends when a whole global batch no longer fits.

    Args:
        dataset: samples that are dictionaries with at least `tokens`, `labels`, `loss_mask`, `position_ids`.
        micro_batch_size: samples of one rank's micro-batch.
        global_batch_size: G, samples over all ranks of the optimizer step that follows so many consumed ones.
        data_parallel_rank: this rank's place among the data-parallel ranks.
        data_parallel_size: their number.
        consumed_samples: where to resume, counted over all ranks.
        num_workers: loading processes; 0 loads in this one.

    Raises:
        ConfigError: the global batch is not a whole number of micro-steps.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, torch.Tensor]],
        *,
        micro_batch_size: int,
        global_batch_size: Callable[[int], int],
        data_parallel_rank: int,
        data_parallel_size: int,
        consumed_samples: int = 0,
        num_workers: int = 0,
    ) -> None:
        assert 0 <= data_parallel_rank < data_parallel_size
        step, first = micro_batch_size * data_parallel_size, global_batch_size(consumed_samples)
        if first % step:
            message = (
                f"not a multiple of micro_batch_size {micro_batch_size} times {data_parallel_size} data-parallel ranks"
            )
            raise ConfigError(f"train.global_batch_size {first}: {message}; make it a multiple of {step}")
        length = len(dataset)  # type: ignore[arg-type]
        assert length >= consumed_samples + first, "a dataset is built for the samples consumed and the steps to come"

        def indices() -> Iterator[list[int]]:
            begin = consumed_samples
            while (end := begin + global_batch_size(begin)) <= length:
                for start in range(begin + data_parallel_rank * micro_batch_size, end, step):
                    yield list(range(start, start + micro_batch_size))
                begin = end

        self._batches = iter(
            DataLoader(
                dataset,
                batch_sampler=indices(),
                num_workers=num_workers,
                collate_fn=_collate,
                pin_memory=torch.cuda.is_available(),
                # The loader draws a seed; not from the global generator, whose state dropout needs for an exact resume.
                generator=torch.Generator(),
            )
        )

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        """The next micro-batch.

        Returns:
            `tokens`, `labels`, `position_ids` int64 and `loss_mask` float32, each `[micro_batch_size, seq_length]`.
        """
        return next(self._batches)


def _collate(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {key: default_collate([sample[key] for sample in samples]) for key in _KEYS}
