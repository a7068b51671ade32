"""Every random generator of every rank, as JSON: torch, Megatron-Core's tracker, Python's and numpy's.

Restored under the same layout they make a resumed run draw the numbers (dropout) that the straight run drew.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

RandomStates = list[dict[str, Any] | int]
"""By rank: its generators, or the earlier rank whose generators are the same, as those of replicas are."""


def gather_random_states() -> RandomStates:
    """All ranks' generators. Collective over all processes; the list is complete on rank 0 and empty elsewhere."""
    first = dist.get_rank() == 0
    states: list[Any] = [None] * dist.get_world_size() if first else []
    dist.gather_object(_local_states(), states if first else None, dst=0)
    return without_repeats(states)


def without_repeats(states: Sequence[dict[str, Any]]) -> RandomStates:
    """What is stored of all ranks' generators: 20 kB of each would be 20 MB on 1,024 ranks. Local."""
    first: dict[str, int] = {}
    ranks = [first.setdefault(json.dumps(state, sort_keys=True), rank) for rank, state in enumerate(states)]
    return [state if same == rank else same for rank, (same, state) in enumerate(zip(ranks, states, strict=True))]


def restore_random_states(states: RandomStates) -> bool:
    """Restore this rank's generators. Local.

    Returns:
        False, and nothing has changed, where CPU and CUDA differ: their generators have states of other kinds.

    Raises:
        LookupError, TypeError, ValueError, RuntimeError: not what `gather_random_states` gave.
    """
    mine = states[dist.get_rank()]
    if isinstance(mine, int):  # the number of the first rank whose states these are too
        mine = states[mine]
    if not isinstance(mine, dict):
        raise TypeError(f"{mine!r} where a rank's random states belong")
    if ("cuda" in mine) != torch.cuda.is_available():
        return False
    _restore(mine)
    return True


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Put this rank's generators back, after the block, where they were before it. Local."""
    states = _local_states()
    try:
        yield
    finally:
        _restore(states)


def _restore(mine: dict[str, Any]) -> None:
    torch.set_rng_state(_decode(mine["cpu"]))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode(mine["cuda"]))
    get_cuda_rng_tracker().set_states({name: _decode(text) for name, text in mine["tracker"].items()})
    version, words, gauss = mine["python"]
    random.setstate((version, tuple(words), gauss))
    numpy_state = mine["numpy"]
    key = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy_state, "state": {**numpy_state["state"], "key": key}})


def _local_states() -> dict[str, Any]:
    local: dict[str, Any] = {"cpu": _encode(torch.get_rng_state())}
    if torch.cuda.is_available():
        local["cuda"] = _encode(torch.cuda.get_rng_state())
    local["tracker"] = {name: _encode(state) for name, state in get_cuda_rng_tracker().get_states().items()}
    local["python"] = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    key = [int(word) for word in numpy_state["state"]["key"]]
    local["numpy"] = {**numpy_state, "state": {**numpy_state["state"], "key": key}}
    return local


def _encode(state: torch.Tensor) -> str:
    return bytes(state.numpy()).hex()


def _decode(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)
