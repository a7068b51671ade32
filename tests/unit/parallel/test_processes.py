"""Shares of a piece of work: every part once and in order, and a single process that needs nobody."""

from __future__ import annotations

import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.parallel.processes import Processes, connected_processes


@given(count=st.integers(1, 300), size=st.integers(1, 20))
def test_places_cover_everything_once_and_in_order(count: int, size: int) -> None:
    parts = [list(range(count))[Processes(rank, size).places(count)] for rank in range(size)]
    assert [entry for part in parts for entry in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_is_all_of_them() -> None:
    with connected_processes() as processes:
        assert processes == Processes(0, 1) and processes.is_first
        assert processes.gather([3, 1]) == [3, 1]
        assert processes.distribute([1, 2, 3], lambda parts: [10 * part for part in parts]) == [10, 20, 30]
        assert processes.from_first(lambda: "made") == "made"
        sums = torch.ones(2)
        assert processes.total(sums) is sums
        processes.wait()
        assert not torch.distributed.is_initialized()


def test_neither_megatron_nor_a_backend_is_needed() -> None:
    code = "import sys, sparsecod_megatron.parallel.processes; print('megatron' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"
