"""Token ids for layers that read them, beside the hidden states.

They travel as Megatron-Core's `context`, which its decoder hands to every layer and which full recompute saves with the
other inputs. An attribute of a module would not do: under pipeline parallelism with full recompute the backward pass
of one micro-batch would find the ids of another (a right loss, a wrong gradient).

    context [chunks, halo + S_chunk, B, 2], int64: id, and position in its document

Chunks are the contiguous parts of the sequence that a context-parallel rank holds, in its order: two, or one without
context parallelism. Each has the `halo` tokens before it, so that no rank has to ask another. Before the beginning of
a sample the id is -1; a document begins where positions do, so the token k before one at position p is of the same
document where k ≤ p. Micro-batches are read by every pipeline stage, so ids need not travel with activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from torch import Tensor

NO_TOKEN = -1
"""Id where there is no token."""


def token_context(
    tokens: Tensor, positions: Tensor, halo: int, cp_group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """What layers receive of a micro-batch. Local.

    Args:
        tokens: ids of whole sequences [B, S], before context parallelism cuts them.
        positions: of each in its document, [B, S].
        halo: tokens before its own that a layer needs.
        cp_group: ranks that share the sequence, in Megatron-Core's zig-zag order; None: this one alone.

    Returns:
        [chunks, halo + S_chunk, B, 2].
    """
    ids = F.pad(tokens, (halo, 0), value=NO_TOKEN)
    pairs = torch.stack((ids, F.pad(positions, (halo, 0))), dim=-1).transpose(0, 1)
    if cp_group is None or cp_group.size() == 1:
        return pairs.unsqueeze(0)
    chunks = 2 * cp_group.size()
    length, rank = tokens.shape[1] // chunks, cp_group.rank()
    starts = (rank * length, (chunks - 1 - rank) * length)
    return torch.stack([pairs[start : start + halo + length] for start in starts])


def all_logits(model: GPTModel, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of ids [B, S] by a model that one process holds, one document per sequence. Local."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    halo = getattr(model, "token_halo", None)
    extra = None if halo is None else {"context": token_context(tokens, positions, int(halo))}
    logits: Tensor = model(tokens, positions, None, extra_block_kwargs=extra)
    return logits
