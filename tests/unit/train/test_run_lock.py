"""Who has a run directory is told to the second; the dead have nothing."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.errors import ConfigError

select_backend()
from sparsecod_megatron.train.run_lock import STATUS_OF_LOST_LOCK, RunLock  # noqa: E402

QUICK: dict[str, Any] = {"heartbeat_s": 0.05, "lease_s": 1.0}


def rewritten(run: Path, **entries: Any) -> None:
    """The lock as another would have written it, its last sign of life left as it is."""
    path = run / "run.lock"
    seen = path.stat().st_mtime
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    os.utime(path, (seen, seen))


def left_by_a_killed_process(run: Path) -> int:
    """A process takes the lock and is killed; its id. It stays a zombie until the parent waits for it."""
    ready, told = os.pipe()
    if (child := os.fork()) == 0:
        RunLock(run).take()
        os.write(told, b"1")
        time.sleep(60)
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    return child


def test_a_second_is_told_who_has_it_and_nothing_changes(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    lock = RunLock(run)
    lock.take()
    before = [(path, path.stat().st_ino) for path in run.iterdir()]
    with pytest.raises(ConfigError, match=rf"run_dir: .*mine is in use by process {os.getpid()} on .*, since \d{{4}}-"):
        RunLock(run).take()
    assert [(path, path.stat().st_ino) for path in run.iterdir()] == before
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_has_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A zombie neither; the takeover is told."""
    killed = left_by_a_killed_process(tmp_path)
    lock = RunLock(tmp_path)
    with caplog.at_level("WARNING", logger="sparsecod"):
        lock.take()
    assert f"taken over from process {killed} on" in caplog.text
    lock.release()
    os.waitpid(killed, 0)
    assert list(tmp_path.iterdir()) == []


def test_another_process_of_the_same_id_is_not_the_holder(tmp_path: Path) -> None:
    left_by_a_killed_process(tmp_path)
    rewritten(tmp_path, process=os.getpid())
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_another_nodes_holder_lives_as_long_as_it_beats(tmp_path: Path) -> None:
    """Its process id says nothing here: this process's own, or one that is not there."""
    theirs = RunLock(tmp_path, heartbeat_s=0.05, give_up=lambda status: None)
    theirs.take()
    elsewhere = {"host": "node7", "machine": "another", "process": 999999999}
    rewritten(tmp_path, **elsewhere)
    theirs._own = type(theirs._own)(**json.loads((tmp_path / "run.lock").read_text()))
    with pytest.raises(ConfigError, match="in use by process 999999999 on node7"):
        RunLock(tmp_path, **QUICK).take()
    theirs._ended.set()
    theirs._thread.join()
    began = time.monotonic()
    ours = RunLock(tmp_path, **QUICK)
    ours.take()
    assert 0.5 < time.monotonic() - began < 30
    ours.release()


@pytest.mark.parametrize("content", ["", "{}", '{"host": 1}', "[]"])
def test_a_lock_that_says_nothing_goes_by_its_age(content: str, tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    path.write_text(content)
    os.utime(path, (0, 0))
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


@pytest.mark.parametrize("attempt", range(8))
def test_one_of_many_takes_over(attempt: int, tmp_path: Path) -> None:
    """Two did in one attempt of ten while a starter could move the next one's lock away for a moment."""
    left_by_a_killed_process(tmp_path)
    locks, told = [RunLock(tmp_path, give_up=lambda status: None) for _ in range(8)], list[str]()

    def start(lock: RunLock) -> None:
        try:
            lock.take()
            told.append("taken")
        except ConfigError:
            told.append("refused")

    threads = [threading.Thread(target=start, args=(lock,)) for lock in locks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(told) == ["refused"] * 7 + ["taken"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
    next(lock for lock in locks if lock._thread.is_alive()).release()


@pytest.mark.parametrize(
    "loss", [lambda path: path.unlink(), lambda path: path.write_text("{}")], ids=["gone", "other"]
)
def test_who_stood_still_too_long_ends(loss: Callable[[Path], object], tmp_path: Path) -> None:
    """And takes nothing with it."""
    statuses: list[int] = []
    lock = RunLock(tmp_path, heartbeat_s=0.02, give_up=statuses.append)
    lock.take()
    loss(tmp_path / "run.lock")
    lock._thread.join(timeout=60)
    assert statuses == [STATUS_OF_LOST_LOCK]
    there = list(tmp_path.iterdir())
    lock.release()
    assert list(tmp_path.iterdir()) == there
