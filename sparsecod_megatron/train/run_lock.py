"""A run directory belongs to one running run: a second start is told who has it, and takes it over from the dead.

Whether the holder lives, its own machine knows by process and start time. Elsewhere its heartbeat tells, the lock
file's time of change: two readings of it are compared with each other, or with a file just made in the same directory,
never with the clock of this machine.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch.distributed as dist

from sparsecod_megatron.checkpoint.first_rank import on_first_rank
from sparsecod_megatron.config.run_files import LOCK_FILE
from sparsecod_megatron.errors import ConfigError

logger = logging.getLogger("sparsecod")

HEARTBEAT_S = 10.0
LEASE_S = 60.0
"""Without a heartbeat for this long, a holder on another node counts as dead."""
STATUS_OF_LOST_LOCK = 4
"""Exit status of a process whose lock was taken over while it stood still."""


@dataclass(frozen=True)
class Holder:
    """Who has a run directory: the content of its lock file.

    Attributes:
        host: its name.
        machine: kernel and process namespace, within which `process` means something.
        process: id of rank 0.
        started: when that process began, in seconds after its machine.
        since: when it took the lock, for people.
        token: no other lock has.
    """

    host: str
    machine: str
    process: int
    started: float
    since: str
    token: str


@contextlib.contextmanager
def locked_run(run_dir: Path) -> Iterator[None]:
    """The run directory is this run's while the block runs; rank 0 holds it. Collective over all processes.

    Raises:
        ConfigError: on all ranks, where another run has it.
    """
    lock = RunLock(run_dir)
    on_first_rank(lock.take)
    try:
        yield
    finally:
        if dist.get_rank() == 0:
            lock.release()


class RunLock:
    """The lock file of one run directory.

    Args:
        run_dir: made if it is not there; gone again if nothing else is in it in the end.
        heartbeat_s: between two signs of life.
        lease_s: how long one is waited for.
        give_up: ends the process with a status, where another has taken the lock.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        heartbeat_s: float = HEARTBEAT_S,
        lease_s: float = LEASE_S,
        give_up: Callable[[int], object] = os._exit,
    ) -> None:
        self._run_dir, self._path = run_dir, run_dir / LOCK_FILE
        self._heartbeat_s, self._lease_s, self._give_up = heartbeat_s, lease_s, give_up
        self._made: list[Path] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._own = Holder(
            host=socket.gethostname(),
            machine=_machine(),
            process=os.getpid(),
            started=_start_time(psutil.Process()),
            since=time.strftime("%Y-%m-%d %H:%M:%S"),
            token=secrets.token_hex(8),
        )

    def take(self) -> None:
        """Take the lock, from a dead holder too; from one on another node only after the lease. Local.

        Raises:
            ConfigError: its holder lives, or the file cannot be written.
        """
        self._made = [folder for folder in (self._run_dir, *self._run_dir.parents) if not folder.exists()]
        try:
            self._run_dir.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = _read(self._path)
                if self._is_alive(holder):
                    raise ConfigError(
                        f"logging.run_dir: {self._run_dir} is in use by {_described(_read(self._path))}; stop that, "
                        "or choose another directory"
                    )
                if self._take_over(holder):
                    break
        except OSError as error:
            raise ConfigError(f"logging.run_dir: {self._path} cannot be written ({error.strerror})") from error
        self._thread.start()

    def release(self) -> None:
        """Release the directory. Local."""
        self._ended.set()
        self._thread.join()
        if _read(self._path) == self._own:
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            for folder in self._made:
                folder.rmdir()

    def _create(self) -> bool:
        """Whether the lock was free and is ours now."""
        try:
            with self._path.open("x") as file:
                json.dump(asdict(self._own), file)
        except FileExistsError:
            return False
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _take_over(self, dead: Holder | None) -> bool:
        """Whether the lock was still `dead`'s and is ours now; starters look and write one after the other."""
        try:
            with self._path.open("r+") as file:
                # Where there is no flock, as on some network file systems, a second writer is told by its heartbeat.
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file.fileno()).st_ino != self._path.stat().st_ino or _read(self._path) != dead:
                    return False
                file.write(json.dumps(asdict(self._own)))
                file.truncate()
        except FileNotFoundError:
            return False
        logger.warning("%s: taken over from %s", self._run_dir, _described(dead))
        return True

    def _is_alive(self, holder: Holder | None) -> bool:
        if holder is not None and holder.machine == self._own.machine:
            return _runs(holder.process, holder.started)
        first = _changed(self._path)
        with tempfile.NamedTemporaryFile(dir=self._run_dir) as now:
            left = self._lease_s - (os.fstat(now.fileno()).st_mtime - (first or 0))
        if left > self._heartbeat_s:
            logger.warning("%s: waiting up to %.0f s for a sign of life from another node", self._path, left)
        deadline = time.monotonic() + left
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._heartbeat_s))
            if (last := _changed(self._path)) != first:
                return last is not None
        return False

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            try:
                os.utime(self._path)
                holder = _read(self._path)
            except FileNotFoundError:
                holder = None
            except OSError as error:  # a file system that is away for a moment
                logger.warning("%s: %s", self._path, error.strerror)
                continue
            if holder != self._own:
                logger.critical("%s: taken over by another run while this one stood still", self._path)
                self._give_up(STATUS_OF_LOST_LOCK)
                return


def _read(path: Path) -> Holder | None:
    """The holder; None where the file is gone or says nothing."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _described(holder: Holder | None) -> str:
    return f"process {holder.process} on {holder.host}, since {holder.since}" if holder else "another run"


def _changed(path: Path) -> float | None:
    """When the file was last touched; opened, because a network file system may know only then."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _runs(process: int, started: float) -> bool:
    """Whether that process of this machine, and no later one of the same id, runs."""
    try:
        found = psutil.Process(process)
        return abs(_start_time(found) - started) < 1 and found.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start_time(process: psutil.Process) -> float:
    """Seconds from the start of the machine to that of the process, whatever becomes of its clock."""
    return -psutil.boot_time() + process.create_time()


def _machine() -> str:
    """Another one after a restart of the machine, and in another container."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
