"""What only rank 0 does, so that all ranks learn how it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from sparsecod_megatron.errors import CheckpointError

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Do something on rank 0 and hand its result to all. Collective over all processes.

    Raises:
        CheckpointError: on all ranks, where it raised OSError.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            outcome[1] = f"{error.strerror or error}{place}"
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(f"{outcome[1]}; make room there or change logging.run_dir")
    return outcome[0]
