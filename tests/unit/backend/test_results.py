"""The queue of a checkpoint's writers: results of forked processes, in order, large ones too, while nobody reads."""

from __future__ import annotations

import multiprocessing
import queue

import pytest
import torch

from sparsecod_megatron.backend import select_backend


def test_results_of_forked_processes_arrive_in_order() -> None:
    select_backend()
    from sparsecod_megatron.backend.cpu.results import ResultsQueue

    results = ResultsQueue()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    sent = [{"step": number, "text": "x" * (number << 19)} for number in range(3)]  # more than a pipe holds
    for part in (sent[:2], sent[2:]):
        process = multiprocessing.get_context("fork").Process(target=lambda part=part: [*map(results.put, part)])
        process.start()
        process.join(timeout=60)
        assert process.exitcode == 0
        for result in part:
            assert results.get_nowait() == result
        with pytest.raises(queue.Empty):
            results.get_nowait()


def test_an_exception_arrives_as_it_was_raised() -> None:
    select_backend()
    from sparsecod_megatron.backend.cpu.results import ResultsQueue

    results = ResultsQueue()
    results.put(RuntimeError("disk full"))
    received = results.get_nowait()
    assert isinstance(received, RuntimeError) and received.args == ("disk full",)


def test_the_writer_uses_it() -> None:
    if torch.cuda.is_available():
        pytest.skip("of the CPU backend")
    select_backend()
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from sparsecod_megatron.backend.cpu.results import ResultsQueue

    found = filesystem_async._get_write_results_queue()
    assert isinstance(found, ResultsQueue) and found is filesystem_async._get_write_results_queue()
