"""torch.cuda calls and literal `device="cuda"` that Megatron-Core makes unconditionally, answered for the CPU.

On one CPU device there is one stream and everything is synchronous, so streams and events have nothing left to do.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._device

from sparsecod_megatron.backend.redirection import Redirection

_CPU = torch.device("cpu")


class CpuStream:
    """The only stream there is; waiting for it is a no-op because every operation has finished when it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: CpuStream) -> None:
        """Nothing is pending."""

    def wait_event(self, event: CpuEvent) -> None:
        """Nothing is pending."""

    def synchronize(self) -> None:
        """Nothing is pending."""

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that has already happened."""
        return event or CpuEvent()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuStream)

    def __hash__(self) -> int:
        return hash(CpuStream)


class CpuEvent:
    """A point in the only stream: already reached."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def record(self, stream: CpuStream | None = None) -> None:
        """Already reached."""

    def wait(self, stream: CpuStream | None = None) -> None:
        """Already reached."""

    def synchronize(self) -> None:
        """Already reached."""

    def query(self) -> bool:
        """Already reached."""
        return True


def _nothing_to_do() -> Callable[..., None]:
    """A new function each time: torch.compile's tables refuse one object under two names of torch."""

    def no_op(*args: Any, **kwargs: Any) -> None:
        return None

    return no_op


def _single_stream() -> Callable[..., CpuStream]:
    def stream(device: Any = None) -> CpuStream:
        return CpuStream()

    return stream


def _stream_context(stream: CpuStream | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The tensor factory with `device="cuda"` read as the CPU."""

    @functools.wraps(factory)
    def create(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device == "cuda":
            device = _CPU
        return factory(*args, device=device, **kwargs)

    return create


def redirections() -> list[Redirection]:
    """Redirections of torch itself."""
    # torch recognises its factories under `with torch.device(...)` by identity, in a set it makes once: let it hold the
    # originals, which the wrappers below call. transformers loads models on the meta device that way.
    torch.utils._device._device_constructors()
    cuda = torch.cuda
    streams = (
        "tensor_parallel/layers.py, transformer/moe/token_dispatcher.py:871, transformer/moe/shared_experts.py:162"
    )
    literal = "pipeline_parallel/schedules.py:596/983/2138, optimizer/clip_grads.py:103, optimizer/optimizer.py:481/485"
    table: list[tuple[Any, str, Any, str, str]] = [
        (
            cuda,
            "current_device",
            lambda: _CPU,
            "tensor_parallel/mappings.py:141, layers.py:261",
            "device of new tensors",
        ),
        (
            cuda,
            "set_device",
            _nothing_to_do(),
            "dist_checkpointing/strategies/async_utils.py:165",
            "there is one device",
        ),
        (
            cuda,
            "synchronize",
            _nothing_to_do(),
            "pipeline_parallel/p2p_communication.py:242/398",
            "CPU work is synchronous",
        ),
        (cuda, "empty_cache", _nothing_to_do(), "transformer/mlp.py:346", "there is no caching allocator"),
        (cuda, "Stream", CpuStream, streams, "side streams"),
        (cuda, "Event", CpuEvent, streams, "side streams"),
        (cuda, "stream", _stream_context, streams, "side streams"),
        (cuda, "current_stream", _single_stream(), streams, "side streams"),
        (cuda, "default_stream", _single_stream(), "distributed/param_and_grad_buffer.py:422/529", "side streams"),
        (
            cuda,
            "get_rng_state",
            lambda device=None: torch.get_rng_state(),
            "tensor_parallel/random.py:235",
            "one generator",
        ),
        (cuda, "manual_seed", lambda seed: torch.manual_seed(seed), "tensor_parallel/random.py:237", "one generator"),
        (
            torch.Tensor,
            "cuda",
            lambda self, *_, **__: self,
            "dist_checkpointing/exchange_utils.py:499",
            "already in place",
        ),
    ]
    for name in ("zeros", "ones", "empty", "tensor", "empty_like"):
        table.append((torch, name, _on_cpu(getattr(torch, name)), literal, 'literal device="cuda"'))
    return [Redirection(*row) for row in table]
