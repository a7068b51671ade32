"""Runs all rows in processes that are started once: each row uses the first few of them as its world.

Importing torch and Megatron-Core takes longer than a row.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from tqdm import tqdm

from sparsecod_megatron.audit.compare import Verdict, compare
from sparsecod_megatron.audit.measure import measure
from sparsecod_megatron.audit.measurement import Measurement
from sparsecod_megatron.audit.rows import Row, with_references
from sparsecod_megatron.backend import Backend
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import SparsecodError

PATIENCE = datetime.timedelta(minutes=10)
"""Time limit of a process whose peers have left the row; a row takes seconds."""


@dataclass(frozen=True)
class Processes:
    """The processes that a launcher started.

    Attributes:
        store: through which they find and tell each other.
        rank: rank of this process.
        size: number of them.
    """

    store: dist.Store
    rank: int
    size: int


def started_processes() -> Processes:
    """What the launcher's environment says. Collective over all processes; once in each."""
    return Processes(*next(rendezvous("env://", timeout=PATIENCE)))


def audit_rows(
    processes: Processes, rows: Sequence[Row], small: RunConfig, backend: Backend, folder: Path
) -> list[Verdict]:
    """Measure and compare; what is red is measured again with another seed. Collective over all processes.

    A token that is near a tie of two experts goes to one or the other by rounding, and then everything differs: seldom,
    and with one seed. A fault is there with every seed.

    Args:
        processes: as many as the largest row needs, or more.
        rows: references before what is compared with them, by number of processes.
        small: from `small_run`.
        backend: the selected backend.
        folder: for checkpoints, the same on all processes.

    Returns:
        One verdict a row, on the first process; nothing on the others.
    """
    store = processes.store
    verdicts = run_rows(processes, rows, small, backend, folder)
    if processes.rank == 0:
        store.set("red", json.dumps([each.row for each in verdicts if each.red and each.against and each.losses]))
    red = json.loads(store.get("red"))
    _leave(store, "read", processes)
    if not red:
        return verdicts
    train = replace(small.train, seed=small.train.seed + 1)
    second = replace(processes, store=dist.PrefixStore("second", store))
    found = run_rows(second, with_references(rows, red), replace(small, train=train), backend, folder / "second")
    again = {verdict.row: verdict for verdict in found}
    return [
        replace(again[first.row], once=first.first) if first.row in red and not again[first.row].red else first
        for first in verdicts
    ]


def run_rows(
    processes: Processes, rows: Sequence[Row], small: RunConfig, backend: Backend, folder: Path
) -> list[Verdict]:
    """Measure and compare, once. Collective over all processes; arguments and result as of `audit_rows`."""
    store, rank = processes.store, processes.rank
    verdicts: list[Verdict] = []
    kept: dict[str, Measurement | str] = {}
    needed, table = {row.against for row in rows}, ParameterTable.of(small)
    with _quick_collections(), tqdm(total=len(rows), unit="row", disable=None if rank == 0 else True) as bar:
        for row, found in _measured(processes, rows, small, backend, folder):
            if rank == 0:
                expected = None if row.against is None else kept[row.against]
                verdicts.append(compare(row, found, expected, table=table, on_cpu=backend.name == "cpu"))
                if row.name in needed:
                    kept[row.name] = found
            bar.set_postfix_str(row.name, refresh=False)
            bar.update()
    _leave(store, "end", processes)
    return verdicts


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Leaves what is imported, half a million objects, out of the garbage collection after each row."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def _measured(
    processes: Processes, rows: Sequence[Row], small: RunConfig, backend: Backend, folder: Path
) -> Iterator[tuple[Row, Measurement | str]]:
    """Each row and what it did, or why it could not; the processes that are not part of a row wait for the next."""
    store, rank = processes.store, processes.rank
    for index, row in enumerate(rows):
        size = row.layout.nproc
        found: Measurement | str = "not part of it"
        if rank < size:
            # A world a row: a row that failed may leave collectives that nobody finished, and the groups of a layout,
            # with four threads each, live for as long as their world.
            with _world(backend, dist.PrefixStore(f"world{index}", store), rank, size):
                found = _attempt(row, small, backend, folder / str(index))
                problem = found if isinstance(found, str) else None
                store.set(f"row{index}/{rank}", json.dumps([time.monotonic(), problem]))
            gc.collect()
        # The first in time is the cause: the others' are about the connection that it took with it.
        ends = sorted(json.loads(end) for end in _words(store, f"row{index}", size))
        yield row, next((problem for _, problem in ends if problem is not None), found)


@contextlib.contextmanager
def _world(backend: Backend, store: dist.Store, rank: int, size: int) -> Iterator[None]:
    dist.init_process_group(
        backend.communication,
        store=store,
        rank=rank,
        world_size=size,
        timeout=PATIENCE,
        device_id=backend.device if backend.device.type == "cuda" else None,
    )
    yield
    dist.destroy_process_group()


def _attempt(row: Row, small: RunConfig, backend: Backend, checkpoints: Path) -> Measurement | str:
    """What the row did, or in one line why it could not."""
    try:
        return measure(row, small, backend, checkpoints)
    except SparsecodError as error:
        return " ".join(str(error).split())
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return " ".join(f"{type(error).__name__} at {where}: {error}".split())[:400]


def _leave(store: dist.Store, key: str, processes: Processes) -> None:
    """The first process, which may hold the store, waits until the others have had their answers out of it."""
    store.set(f"{key}/{processes.rank}", "")
    if processes.rank == 0:
        store.wait([f"{key}/{rank}" for rank in range(processes.size)], 2 * PATIENCE)


def _words(store: dist.Store, key: str, size: int) -> list[str]:
    """What each of `size` processes has said; waits until all have, also where a collective of theirs has failed."""
    names = [f"{key}/{rank}" for rank in range(size)]
    store.wait(names, 2 * PATIENCE)
    return [store.get(name).decode() for name in names]
