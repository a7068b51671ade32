"""Megatron's sample index, built by one process of the job and put into the cache whole.

Megatron writes the files of an index in place, one after the other: a job killed in between would leave a cache that
stops every later one, and two jobs that share a cache could read each other's halves.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from sparsecod_megatron.errors import DataError

_DESCRIPTION = "description.txt"
_PARTS = (_DESCRIPTION, "document_index.npy", "sample_index.npy", "shuffle_index.npy")
T = TypeVar("T")


class CachedGPTDataset(GPTDataset):
    """GPTDataset whose cache directory only ever holds complete indices.

    The first process builds into a folder of its own inside the cache and renames the files; any number of jobs may do
    so at once, because equal names mean equal content.
    """

    config: GPTDatasetConfig

    def _build_document_sample_shuffle_indices(self) -> Any:
        cache = Path(self.config.path_to_cache)
        base = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        names = [f"{base}-{part}" for part in _PARTS]
        if is_first_process() and not all((cache / name).is_file() for name in names):
            config = self.config
            with tempfile.TemporaryDirectory(prefix=".building-", dir=cache) as folder:
                self.config = dataclasses.replace(config, path_to_cache=folder)
                super()._build_document_sample_shuffle_indices()
                self.config = config
                for name in names:
                    (Path(folder) / name).replace(cache / name)
        return super()._build_document_sample_shuffle_indices()


def is_first_process() -> bool:
    """Whether this is the one process of the job that builds."""
    return not dist.is_initialized() or dist.get_rank() == 0


def first_process_first(build: Callable[[], T]) -> T:
    """Run `build` on the first process, then on all others. Collective where torch.distributed runs.

    Args:
        build: must be quick where the first process has left files behind.

    Raises:
        DataError: on every process, where `build` raised it on the first; or a file that the first wrote is not there.
    """
    result: T | None = None
    failure: list[str | None] = [None]
    if is_first_process():
        try:
            result = build()
        except DataError as error:
            failure[0] = str(error)
    if dist.is_initialized():
        dist.broadcast_object_list(failure, src=0)  # also the barrier that the others wait at
    if failure[0] is not None:
        raise DataError(failure[0])
    return build() if result is None else result
