"""Megatron-Core functions that assume a CUDA tensor or generator, written for the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import token_dispatcher

from sparsecod_megatron.backend.redirection import Redirection


def get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """State of the one generator there is, as a byte tensor."""
    return torch.get_rng_state()


def set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    """Set the one generator there is."""
    torch.set_rng_state(new_state)


@contextlib.contextmanager
def fork(self: megatron_random.CudaRNGStatesTracker, name: str = "model-parallel-rng") -> Iterator[None]:
    """Run a block with the named random state and put the outer one back.

    Upstream also warns if the CPU generator moved meanwhile; here the CPU generator is the one being forked.
    """
    assert name in self.states_, f"random state {name!r} was never added"
    outer = torch.get_rng_state()
    torch.set_rng_state(self.states_[name])
    try:
        yield
    finally:
        self.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer)


def move_to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """Token counts for the all-to-all: already on the host, but callers rely on the conversion to numpy."""
    if as_numpy and torch.is_tensor(tensor):
        return tensor.numpy()
    return tensor


def positions_on_this_cp_rank(
    pos_emb: torch.Tensor, seq_dim: int, cp_group: torch.distributed.ProcessGroup
) -> torch.Tensor:
    """This context-parallel rank's two chunks of the positions, r and 2·size−1−r of 2·size; upstream pins memory."""
    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    rank = cp_group.rank()
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim=seq_dim)


def redirections() -> list[Redirection]:
    """Redirections of Megatron-Core's own functions."""
    tracker, generator = megatron_random.CudaRNGStatesTracker, "one generator"
    table: list[tuple[Any, str, Any, str, str]] = [
        (megatron_random, "_get_cuda_rng_state", get_rng_state, "tensor_parallel/random.py:41", generator),
        (megatron_random, "_set_cuda_rng_state", set_rng_state, "tensor_parallel/random.py:74", generator),
        (tracker, "fork", fork, "tensor_parallel/random.py:243", generator),
        (
            token_dispatcher,
            "maybe_move_tensor_to_cpu",
            move_to_host,
            "token_dispatcher.py:876",
            "skips conversion of host tensors",
        ),
    ]
    for module in (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding):
        name = "get_pos_emb_on_this_cp_rank"
        table.append(
            (module, name, positions_on_this_cp_rank, "models/common/embeddings/rope_utils.py:62", "pinned memory")
        )
    return [Redirection(*row) for row in table]
