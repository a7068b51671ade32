"""A signal asks; the handlers before come back."""

from __future__ import annotations

import os
import signal

import pytest

from sparsecod_megatron.train.signals import STOP_SIGNALS, stop_on_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    before = [signal.getsignal(other) for other in STOP_SIGNALS]
    with stop_on_signals() as request:
        assert not request
        os.kill(os.getpid(), number)
        assert request and request.signal is number
    assert [signal.getsignal(other) for other in STOP_SIGNALS] == before
