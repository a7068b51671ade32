"""Groups of the CPU backend share one gloo device, made as torch would make each group's."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.backend.cpu import gloo_device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU backend is for machines without CUDA")
PATIENCE = datetime.timedelta(seconds=17)


def device_threads() -> int:
    return sum(Path(task, "comm").read_text() == "gloo_tcp_loop\n" for task in Path("/proc/self/task").iterdir())


@pytest.fixture
def unshared() -> None:
    select_backend()
    gloo_device._devices.cache_clear()


@pytest.mark.usefixtures("unshared")
def test_one_polling_thread_for_all_groups() -> None:
    before = device_threads()
    groups = [dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timeout=PATIENCE) for _ in range(5)]
    assert device_threads() <= before + 1
    options = [group.options for group in groups]
    assert {each._timeout for each in options} == {PATIENCE} and {each._threads for each in options} == {2}
    ones = torch.ones(3)
    groups[4].allreduce([ones]).wait()
    assert ones.tolist() == [1, 1, 1]


@pytest.mark.usefixtures("unshared")
def test_the_interface_is_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo,lo")
    assert dist.ProcessGroupGloo(dist.HashStore(), 0, 1, PATIENCE).options._threads == 4
    gloo_device._devices.cache_clear()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "none-such")
    with pytest.raises(RuntimeError, match="none-such"):
        dist.ProcessGroupGloo(dist.HashStore(), 0, 1, PATIENCE)
