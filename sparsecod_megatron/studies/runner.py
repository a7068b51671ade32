"""Runs a study's cells on this machine, so many at a time, each a command of its own that can fail or die alone."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from sparsecod_megatron.config.run_files import LOG_FILE
from sparsecod_megatron.config.stop_signals import handling_stop_signals
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.studies.grid import Cell, Study


@dataclass(frozen=True)
class Outcome:
    """How a cell's command ended.

    Attributes:
        cell: the cell.
        status: its exit status; 0 with a result on disk.
        log: what it printed.
    """

    cell: Cell
    status: int
    log: Path

    @property
    def last_words(self) -> str:
        """The last line that it printed."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n") if self.log.is_file() else []
        return next((line for line in reversed(lines) if line.strip()), "")


@dataclass
class Runner:
    """Slots, and the commands that run in them.

    Attributes:
        study: whose cells.
        command: arguments of `sparsecod` that run one cell, up to `--cell`.
        stopped_by: the signal that ended the run early, if one did.
    """

    study: Study
    command: Sequence[str]
    stopped_by: int | None = None
    _running: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Run cells, and yield each as it ends. A stop signal lets the running ones save, and starts no more.

        Raises:
            ConfigError: fewer GPUs than the slots need.
        """
        free: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for environment in slot_environments(self.study.config.launch.slots, self.study.config.launch.nproc):
            free.put(environment)
        with self._passing_signals_on(), ThreadPoolExecutor(self.study.config.launch.slots) as pool:
            waiting: set[Future[Outcome | None]] = {pool.submit(self._run, cell, free) for cell in cells}
            while waiting:
                ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (outcome for future in ended if (outcome := future.result()) is not None)

    def _run(self, cell: Cell, free: queue.SimpleQueue[dict[str, str]]) -> Outcome | None:
        if self.stopped_by is not None:
            return None
        environment = free.get()
        cell.directory.mkdir(parents=True, exist_ok=True)
        log = cell.directory / LOG_FILE
        command = [sys.executable, "-m", "sparsecod_megatron", *self.command, "--cell", cell.name]
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=os.environ | environment,
                start_new_session=True,  # a group of its own, so that a signal reaches the training in it as well
            )
            with self._lock:
                self._running.add(process.pid)
            if self.stopped_by is not None:  # since this cell was taken up
                self._tell(process.pid, self.stopped_by)
            status = process.wait()
            with self._lock:
                self._running.discard(process.pid)
        free.put(environment)
        return Outcome(cell, status, log)

    @staticmethod
    def _tell(group: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)

    @contextlib.contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        def pass_on(number: int, frame: FrameType | None) -> None:
            self.stopped_by = number
            for group in list(self._running):
                self._tell(group, number)

        with handling_stop_signals(pass_on):
            yield


def slot_environments(slots: int, nproc: int) -> list[dict[str, str]]:
    """What each slot's commands are told: their share of processor threads and, where there are any, of GPUs.

    Raises:
        ConfigError: fewer GPUs than slots need.
    """
    threads = str(max(1, (os.cpu_count() or 1) // (slots * nproc)))
    environments = [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)} for _ in range(slots)]
    gpus = visible_gpus()
    if gpus and len(gpus) < slots * nproc:
        raise ConfigError(
            f"launch.slots: {slots} of {nproc} processes need {slots * nproc} GPUs, {len(gpus)} are visible; lower it"
        )
    for slot, environment in enumerate(environments):
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * nproc : (slot + 1) * nproc])
    return environments


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES takes them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]
