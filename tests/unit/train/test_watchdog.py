"""A phase that does not end is told of, with the stacks of all threads; one that does is not."""

from __future__ import annotations

import logging
import math
import threading
import time
from pathlib import Path

import pytest

from sparsecod_megatron.backend import select_backend

select_backend()
from sparsecod_megatron.train import watchdog as module  # noqa: E402 - Megatron-Core comes after the backend
from sparsecod_megatron.train.watchdog import STATUS_OF_HANG, Watchdog  # noqa: E402


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.05)


def watched(path: Path, timeout_s: float) -> tuple[Watchdog, list[int], threading.Event]:
    """A watchdog that records the status with which it would end the process."""
    statuses: list[int] = []
    ended = threading.Event()

    def give_up(status: int) -> None:
        statuses.append(status)
        ended.set()

    return Watchdog(timeout_s=timeout_s, log_path=path, rank=3, give_up=give_up), statuses, ended


def waiting_for_a_rank_that_never_comes(ended: threading.Event) -> None:
    assert ended.wait(60)


def test_a_hung_phase(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watchdog, statuses, ended = watched(tmp_path / "log.txt", 0.3)
    with caplog.at_level(logging.CRITICAL, logger="sparsecod"), watchdog.watching():
        watchdog.enter(7, "optimizer")
        watchdog.enter(8, "statistics")
        waiting_for_a_rank_that_never_comes(ended)
    assert statuses == [STATUS_OF_HANG]
    [line] = caplog.messages
    assert line.startswith("rank 3: step 8: statistics has not ended after 0.3 s (train.step_timeout_s)")
    log = (tmp_path / "log.txt").read_text()
    assert log.startswith("rank 3, step 8, statistics:\n")
    assert "waiting_for_a_rank_that_never_comes" in log and "_watch" in log


def test_a_phase_with_a_limit_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Longer than the others' without being ended, and ended by its own, under its own key."""
    watchdog, statuses, ended = watched(tmp_path / "log.txt", 0.1)
    with caplog.at_level(logging.CRITICAL, logger="sparsecod"), watchdog.watching():
        watchdog.enter(7, "evaluation", timeout_s=math.inf, key="evaluation.timeout_s")
        assert not ended.wait(0.5)
        watchdog.enter(8, "evaluation", timeout_s=0.2, key="evaluation.timeout_s")
        assert ended.wait(60)
    assert statuses == [STATUS_OF_HANG]
    assert "step 8: evaluation has not ended after 0.2 s (evaluation.timeout_s)" in caplog.text


def test_phases_that_end_are_left_alone(tmp_path: Path) -> None:
    """Together far longer than the limit, each of them shorter."""
    watchdog, statuses, _ = watched(tmp_path / "log.txt", 2.0)
    with watchdog.watching():
        for step in range(12):
            watchdog.enter(step, "optimizer")
            time.sleep(0.25)
    assert statuses == [] and not (tmp_path / "log.txt").exists()
    assert all(thread.name != "watchdog" for thread in threading.enumerate())


def test_without_a_limit_nothing_watches(tmp_path: Path) -> None:
    watchdog, _, _ = watched(tmp_path / "log.txt", 0)
    with watchdog.watching():
        assert all(thread.name != "watchdog" for thread in threading.enumerate())


def test_a_log_that_cannot_be_written_is_not_in_the_way(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    watchdog, statuses, ended = watched(tmp_path / "absent" / "log.txt", 0.2)
    with watchdog.watching():
        waiting_for_a_rank_that_never_comes(ended)
    assert statuses == [STATUS_OF_HANG]
    assert "waiting_for_a_rank_that_never_comes" in capfd.readouterr().err
