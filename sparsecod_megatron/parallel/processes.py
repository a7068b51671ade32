"""Processes that share one piece of work on whole models: evaluation and analysis, which have no layout.

Whoever takes which part, each process gets all results in the order of the parts, computes the same numbers from them
and takes the same decisions. Python objects and tensors are exchanged on the CPU, over gloo, whatever device computes.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

Part = TypeVar("Part")
Answer = TypeVar("Answer")

PATIENCE = datetime.timedelta(days=7)
"""How long a process waits for slower ones; where one of them fails, the launcher ends all of them."""


@dataclass(frozen=True)
class Processes:
    """Which process this is of how many; a single one by default.

    Attributes:
        rank: rank of this process.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    @property
    def no_progress(self) -> bool | None:
        """What tqdm takes as `disable`: the first process alone draws bars, and only on a terminal."""
        return None if self.is_first else True

    def places(self, count: int) -> slice:
        """This process's part of `count` consecutive things; parts differ in size by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, found: Sequence[Answer]) -> list[Answer]:
        """Everybody's entries, in the order of processes. Collective over all processes.

        Args:
            found: this process's, of plain data or tensors on the CPU; as many as it likes.
        """
        if self.size == 1:
            return list(found)
        parts: list[list[Answer]] = [[] for _ in range(self.size)]
        dist.all_gather_object(parts, list(found))
        return [entry for part in parts for entry in part]

    def distribute(self, parts: Sequence[Part], work: Callable[[Sequence[Part]], list[Answer]]) -> list[Answer]:
        """Answers to all parts, of which this process works out every Nth. Collective over all processes.

        Args:
            parts: the same on every process.
            work: gives one answer, of plain data, for each of the parts it is given.
        """
        answers: list[Answer | None] = [None] * len(parts)
        for rank, own in enumerate(self.gather([work(parts[self.rank :: self.size])])):
            answers[rank :: self.size] = own
        return answers  # type: ignore[return-value]  # every place is filled

    def total(self, sums: Tensor) -> Tensor:
        """The sum over processes, on the tensor's own device. Collective over all processes."""
        if self.size == 1:
            return sums
        summed = sums.cpu()
        dist.all_reduce(summed)
        return summed.to(sums.device)

    def from_first(self, action: Callable[[], Answer]) -> Answer:
        """What `action` returns on the first process, which alone calls it. Collective over all processes."""
        result = [action() if self.is_first else None]
        if self.size > 1:
            dist.broadcast_object_list(result, src=0)
        return result[0]  # type: ignore[return-value]  # the first process's, everywhere

    def wait(self) -> None:
        """Until every process is here. Collective over all processes."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def connected_processes() -> Iterator[Processes]:
    """The processes that torchrun started, or this one alone, while the block runs. Collective over all processes."""
    if "RANK" not in os.environ:
        yield Processes()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    # Not destroyed where the block raises: that could wait for processes that wait for this one.
    yield Processes(dist.get_rank(), dist.get_world_size())
    dist.destroy_process_group()
