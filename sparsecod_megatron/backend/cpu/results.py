"""How a forked writer of a checkpoint hands its results to the process that forked it: through a file without a name.

Megatron-Core asks a server process for a queue, which takes them apart and so imports torch: two processor seconds on
every rank that saves, more than the writing takes on a small machine. A pipe would not do, because nobody reads it
before the writer has ended.
"""

from __future__ import annotations

import functools
import io
import os
import pickle
import queue
import tempfile
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async

from sparsecod_megatron.backend.redirection import Redirection


class ResultsQueue:
    """A queue from forked processes to the one that made it, with what Megatron-Core uses of a queue."""

    def __init__(self) -> None:
        # Unbuffered and appending: processes share the file's position, so it must not be relied on.
        self._file = tempfile.TemporaryFile("a+b", buffering=0)  # noqa: SIM115 - as long as the process
        self._read_bytes = 0

    def put(self, result: Any) -> None:
        """Append a result, in any process."""
        self._file.write(pickle.dumps(result))

    def get_nowait(self) -> Any:
        """The oldest result that was not taken yet, in the process that made the queue.

        Raises:
            queue.Empty: there is no result.
        """
        number = self._file.fileno()
        waiting = io.BytesIO(os.pread(number, os.fstat(number).st_size - self._read_bytes, self._read_bytes))
        if not waiting.getbuffer().nbytes:
            raise queue.Empty
        result = pickle.load(waiting)
        self._read_bytes += waiting.tell()
        return result


def write_results_queue() -> ResultsQueue:
    """The one queue of this process."""
    return _queue_of(os.getpid())


@functools.cache
def _queue_of(process: int) -> ResultsQueue:
    """Discard what a process inherited by forking: it is its parent's."""
    return ResultsQueue()


def redirections() -> list[Redirection]:
    """Redirections of the checkpoint writer's queue."""
    return [
        Redirection(
            filesystem_async,
            "_get_write_results_queue",
            write_results_queue,
            "dist_checkpointing/strategies/filesystem_async.py:51",
            "its server process imports torch on every rank",
            speed_only=True,
        )
    ]
