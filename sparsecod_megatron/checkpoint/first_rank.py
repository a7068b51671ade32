"""What one rank does or finds, reported to all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sparsecod_megatron.errors import CheckpointError, SparsecodError

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Do something on rank 0 and hand its result to all. Collective over all processes.

    Raises:
        SparsecodError: on all ranks, as it was raised there; CheckpointError, where it raised OSError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except SparsecodError as error:
            outcome[1] = error
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            reason = f"{error.strerror or error}{place}"
            outcome[1] = CheckpointError(f"{reason}; free some space there or change logging.run_dir")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def first_problem(problem: str | None) -> str | None:
    """What the first rank with a problem says, on all. Collective over all processes.

    Args:
        problem: problem of this rank.
    """
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    return next(filter(None, problems), None)
