"""One gloo device for all process groups.

torch gives every group a device of its own, whose thread wakes 100 times per second to look for messages. Megatron
makes some 40 groups per layout: on two cores, the idle threads of four ranks took 45 % of the time (`perf record`).
"""

from __future__ import annotations

import datetime
import functools
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from sparsecod_megatron.backend.redirection import Redirection


@functools.cache
def _devices() -> list[dist.ProcessGroupGloo.Device]:
    """As torch makes them for each group: on the interfaces of GLOO_SOCKET_IFNAME, or the host name's."""
    interfaces = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if not interfaces:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in interfaces.split(",")]


def on_shared_devices(create: Any) -> Callable[..., None]:
    """`ProcessGroupGloo.__init__`, given the process's devices where it would make new ones."""

    @functools.wraps(create)
    def run(self: Any, store: dist.Store, rank: int, size: int, *args: Any, **kwargs: Any) -> None:
        timeout = args[0] if args else kwargs.get("timeout")
        if isinstance(timeout, datetime.timedelta):
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined] # torch's stubs lack it
            options._timeout, options._devices = timeout, _devices()
            options._threads = 2 * len(options._devices)
            args, kwargs = (options,), {}
        create(self, store, rank, size, *args, **kwargs)

    return run


def redirections() -> list[Redirection]:
    """The constructor of gloo's groups."""
    return [
        Redirection(
            dist.ProcessGroupGloo,
            "__init__",
            on_shared_devices(dist.ProcessGroupGloo.__init__),
            "torch's distributed/distributed_c10d.py:2169",
            "each group's device has a polling thread",
            speed_only=True,
        )
    ]
