"""Processes that share one evaluation: each works on every Nth part, and all get all answers in order.

What is gathered are Python numbers, so the processes talk over gloo whatever they compute on.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

Part = TypeVar("Part")
Answer = TypeVar("Answer")

PATIENCE = datetime.timedelta(days=7)
"""Of a rank that waits for slower ones; the launcher ends it at once where one of them fails."""


class Ranks:
    """The processes of an evaluation.

    Args:
        group: their gloo group; None is this process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self._group is None or self._group.rank() == 0

    def deal(self, parts: Sequence[Part], work: Callable[[Sequence[Part]], list[Answer]]) -> list[Answer]:
        """Answers to all parts, of which this rank works out every Nth. Collective over the ranks.

        Args:
            parts: the same on every rank.
            work: gives one answer for each of the parts it is given; picklable.
        """
        if self._group is None:
            return work(parts)
        rank, size = self._group.rank(), self._group.size()
        answers_by_rank: list[Any] = [None] * size
        dist.all_gather_object(answers_by_rank, work(parts[rank::size]), group=self._group)
        answers: list[Any] = [None] * len(parts)
        for first, own in enumerate(answers_by_rank):
            answers[first::size] = own
        return answers

    def from_first(self, action: Callable[[], Answer]) -> Answer:
        """What `action` returns on the first rank, which alone calls it. Collective over the ranks."""
        if self._group is None:
            return action()
        result = [action() if self.is_first else None]
        dist.broadcast_object_list(result, src=0, group=self._group)
        return result[0]  # type: ignore[return-value]


@contextlib.contextmanager
def running_ranks() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone, while the block runs. Collective over all processes."""
    if "RANK" not in os.environ:
        yield Ranks()
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    # Not destroyed where the block raises: that would wait for ranks that wait for this one.
    yield Ranks(dist.group.WORLD)
    dist.destroy_process_group()
