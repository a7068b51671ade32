"""The attention weight of sampled queries on the first token, from the queries and keys that an attention got."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class SeesKeys(Protocol):
    """A core attention that says what its queries see (model/attention.py).

    Attributes:
        softmax_scale: of the scores; None is 1/√D.
    """

    softmax_scale: float | None

    def visible(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """All keys and values that these queries see, and a mask [(heads,) S, S_key] or None (causal)."""


def first_token_weights(
    attention: SeesKeys,
    query: Tensor,
    key: Tensor,
    *,
    packing: Any,
    sampling: int,
    context: ProcessGroup,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q·kᵀ)[first key] of the sampled queries that this rank holds, [B, groups/TP, heads a group, queries].

    Args:
        attention: whose queries these are; collective over `context` where the sequence is sharded.
        query: [S_local, B, heads/TP, D], rotated; [T, heads/TP, D] where documents are packed.
        key: the same with groups/TP.
        packing: Megatron's PackedSeqParams; None where a sequence is one document.
        sampling: distance between two sampled queries.
        context: ranks that share a sequence.
        sinks: scores of no key in the sum, [heads/TP].
    """
    if packing is not None:
        query, key = query.unsqueeze(1), key.unsqueeze(1)
    # No values: only keys are gathered.
    keys, _, mask = attention.visible(query, key, key[..., :0])
    indices = sampled(len(query), sampling, context.rank(), context.size())
    chosen = torch.tensor(indices, dtype=torch.long, device=query.device)
    allowed = torch.arange(len(keys), device=query.device) <= chosen[:, None] if mask is None else mask[..., chosen, :]
    first = torch.zeros_like(chosen)
    if packing is not None:
        starts = packing.cu_seqlens_q.long()
        first = starts[torch.searchsorted(starts, chosen, right=True) - 1]
        allowed = allowed & (torch.arange(len(keys), device=query.device) >= first[:, None])
    if allowed.dim() == 3:  # of each head
        allowed = allowed.unflatten(0, (key.shape[2], -1))
    picked = query[chosen].float().unflatten(2, (key.shape[2], -1))
    scores = torch.einsum("nbgrd,sbgd->bgrns", picked, keys.float())
    scores *= query.shape[-1] ** -0.5 if attention.softmax_scale is None else attention.softmax_scale
    scores = scores.masked_fill_(~allowed, -torch.inf)
    if sinks is not None:
        own = sinks.float().view(key.shape[2], -1)[..., None, None]
        scores = torch.cat((scores, own.expand(*scores.shape[:-1], 1)), dim=-1)
    weights = scores.softmax(dim=-1)
    return weights.gather(-1, first[:, None].expand(*weights.shape[:-1], 1)).squeeze(-1)


def sampled(length: int, sampling: int, rank: int, size: int) -> list[int]:
    """Local indices, in order, of the queries p with (p + 1) divisible by `sampling` that a context rank holds.

    Rank r of n holds chunks r and 2n−1−r of 2n.

    Args:
        length: queries of this rank.
        sampling: distance between two sampled queries.
        rank: of this process among those that share a sequence.
        size: number of those.
    """
    if size == 1:
        return list(range(sampling - 1, length, sampling))
    chunk, found = length // 2, []
    for start, at in ((rank * chunk, 0), ((2 * size - 1 - rank) * chunk, chunk)):
        offset = -(start + 1) % sampling
        found += list(range(at + offset, at + chunk, sampling))
    return found
