"""A signal asks; the handlers before come back; a second one, later, does not ask."""

from __future__ import annotations

import os
import signal
import time

import pytest

from sparsecod_megatron.backend import select_backend

select_backend()
from sparsecod_megatron.config.stop_signals import STOP_SIGNALS  # noqa: E402
from sparsecod_megatron.train.signals import REQUEST_WINDOW_S, stop_on_signals  # noqa: E402


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = [signal.getsignal(other) for other in STOP_SIGNALS]
    with stop_on_signals() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request and request.signal is number
    assert [signal.getsignal(other) for other in STOP_SIGNALS] == before


def test_the_same_request_twice_is_one() -> None:
    with stop_on_signals() as request:
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert request.signal is signal.SIGTERM


@pytest.mark.parametrize("second", STOP_SIGNALS)
def test_a_later_one_ends_the_process(second: signal.Signals) -> None:
    child = os.fork()
    if child == 0:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(REQUEST_WINDOW_S + 0.1)
            os.kill(os.getpid(), second)
            time.sleep(10)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == second
