"""The forked process in which one rank's part of a checkpoint is written: what it does besides, and how it is ended."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import queue
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue, AsyncRequest, TemporalAsyncCaller

from sparsecod_megatron.checkpoint.directories import DIGESTS_PREFIX
from sparsecod_megatron.checkpoint.manifest import file_digest


def start_saving(sharded: dict[str, Any], temporary: Path) -> AsyncRequest:
    """What this rank's writer has to do, forked from it and on its own. Collective.

    From 0.17 on Megatron-Core's default is another package's writer, which is not installed with it.
    """
    takes = inspect.signature(dist_checkpointing.save).parameters
    own = {"async_strategy": "mcore"} if "async_strategy" in takes else {}
    with _no_overwrite_warning():
        request = dist_checkpointing.save(sharded, str(temporary), async_sharded_save=True, **own)
    assert request is not None, "asked for an asynchronous save"
    return _with_digests(request, temporary)


def _with_digests(request: AsyncRequest, temporary: Path) -> AsyncRequest:
    """The request whose writer also hashes what it wrote, beside the training; with an empty queue of results."""
    if request.async_fn is None:
        return request  # nothing to write on this rank
    results = request.async_fn_args[2]
    # Megatron-Core has one queue a process, in which a save that was given up may have left its result.
    with contextlib.suppress(queue.Empty):
        while True:
            results.get_nowait()
    return request._replace(async_fn=partial(_write_and_digest, request.async_fn, temporary))


@contextlib.contextmanager
def _no_overwrite_warning() -> Iterator[None]:
    """While the block runs, Megatron-Core does not take our files in a new directory for an earlier checkpoint's."""
    messages = logging.getLogger(serialization.__name__)
    level = messages.level
    messages.setLevel(logging.ERROR)
    try:
        yield
    finally:
        messages.setLevel(level)


def stop_writers(calls: AsyncCallsQueue) -> None:
    """Kill the writers of this rank, and the processes that they have started. Local."""
    for call in calls.async_calls:
        assert isinstance(call.async_caller, TemporalAsyncCaller), "persistent writers damage optimizer state"
        process = call.async_caller.process
        if process is None:
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
        process.kill()
        process.join(timeout=5)


def _write_and_digest(write: Callable[..., None], temporary: Path, rank: int, buckets: list[Any], results: Any) -> None:
    """Runs in the forked writer of one rank."""
    write(rank, buckets, results)
    paths = [Path(bucket[0]) for bucket in buckets]
    digests = {path.name: file_digest(path) for path in paths if path.exists()}
    with (temporary / f"{DIGESTS_PREFIX}{rank}").open("w") as stream:
        json.dump(digests, stream)
        stream.flush()
        os.fsync(stream.fileno())
