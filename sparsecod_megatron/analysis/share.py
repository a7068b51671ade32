"""One process's share of the sample, and what all processes found put together again.

Every process takes consecutive sequences, and gathering keeps the order of processes: so everyone holds the numbers of
all sequences in the sample's order, computes the same intervals from them and takes the same decisions.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Which process this is.

    Attributes:
        rank: of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    def places(self, count: int) -> slice:
        """This process's part of so many sequences; parts differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, found: Sequence[T]) -> list[T]:
        """Everybody's entries, in the order of processes. Collective over all processes.

        Args:
            found: this process's, of plain data or tensors on the CPU; as many as it likes.
        """
        if self.size == 1:
            return list(found)
        parts: list[list[T]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(found))
        return [entry for part in parts for entry in part]

    def total(self, sums: Tensor) -> Tensor:
        """The sum over processes, in the same place. Collective over all processes."""
        if self.size == 1:
            return sums
        summed = sums.cpu()
        dist.all_reduce(summed)
        return summed.to(sums.device)

    def first(self, value: T) -> T:
        """The first process's value. Collective over all processes."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def wait(self) -> None:
        """Until every process is here. Collective over all processes."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def sharing() -> Iterator[Share]:
    """The processes that torchrun started, connected while the block runs; a single one where it started none."""
    if "RANK" not in os.environ:
        yield Share()
        return
    dist.init_process_group("gloo")
    try:
        yield Share(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def joined(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Tuples of tensors, each of some sequences, as one tuple of tensors of all."""
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
