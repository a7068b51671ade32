"""Which pattern the last queries of a sequence suggest for each head, and what that pattern keeps of all queries.

With α the weights of the last 128 queries (the probe) and blocks of 64 keys, the estimate of a head is
softmax(q̄ · k̄_b), q̄ the mean query of the probe and k̄_b the mean key of a block, and its truth the mass of α in each
block. √JSD is the root of their Jensen-Shannon divergence in nats, 0 to √log 2 = 0.83. A head below 0.1 is
`query_aware`: blocks can be chosen by pooled queries and keys, and every block of 64 queries keeps the fewest blocks
with γ = 0.9 of its estimate. Any other head is `vertical_slash`: it keeps the fewest columns with γ of the probe's
mass, and the fewest diagonals likewise.

The share that is kept counts keys that the mask lets a query see, and recall is the share of the true mass of all
queries, not only of the probe. The probe stands at the end: this says what a sequence looks like, and is no attention
that could be run causally.

FlexPrefill's own code differs: it takes diagonals at multiples of 128 alone, divides by all n² entries, pools the mass
of all blocks of queries, drops the element that crosses γ, and keeps at least 512 tokens.

Source: Lai et al., FlexPrefill (arXiv 2502.20766).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.sparsity.attention import HIDDEN, Call, RowAttention
from sparsecod_megatron.analysis.sparsity.selection import BLOCK, by_distance
from sparsecod_megatron.analysis.sparsity.sparse_rows import MAX_SPARSE_SCORES

LAST_QUERIES = 128
GAMMA = 0.9
TAU = 0.1
INDEX = ("sqrt_jsd", "query_aware", "kept", "recall")
_SLACK = 1e-6  # nine equal masses of ten sum to 0.9 only up to rounding


class PatternIndex(RowAttention):
    """The model's own attention, which takes the index of every head in passing."""

    def __init__(self, blocks: Iterable[nn.Module], max_scores: int = MAX_SPARSE_SCORES) -> None:
        super().__init__(blocks, max_scores)
        self._found: dict[int, dict[nn.Module, Tensor]] = {}

    def attend(self, layer: int | None, module: nn.Module, call: Call) -> Tensor:
        """See `RowAttention`."""
        if layer is not None:
            index = [head_index(one, list(self.parts(one))) for one in call.sequences()]
            self._found.setdefault(layer, {})[module] = torch.stack(index)
        return super().attend(layer, module, call)

    def heads(self, layer: int) -> Tensor:
        """`INDEX` of every head in the last pass: `[sequences, heads of all attentions, 4]`, fp64 on the CPU."""
        return torch.cat(list(self._found[layer].values()), 1)


def head_index(call: Call, parts: list[slice]) -> Tensor:
    """`INDEX` of every head for one sequence: `[heads, 4]`, fp64 on the CPU.

    Args:
        call: of one sequence.
        parts: its queries in parts whose rows may be held.
    """
    keys = call.spread_over_heads(call.key)
    probe = slice(max(0, call.query.shape[2] - LAST_QUERIES), call.query.shape[2])
    weights = call.softmax(call.scores(probe, keys))[0]
    columns, diagonals = weights.sum(1), by_distance(weights, _positions(call, probe)).sum(1)
    means = block_means(keys[0])
    seen = pooled(call.visible(probe)[0].any(1)[:, None], torch.amax)[:, 0]  # [heads or 1, blocks]
    estimate = _estimate(call, call.query[0, :, probe].float().mean(1, keepdim=True), means, seen[:, None])[:, 0]
    truth = pooled(columns, torch.sum)
    distance = root_jsd(estimate, truth / truth.sum(-1, keepdim=True))
    aware = distance < TAU
    lines = fewest(columns), fewest(diagonals)
    blocks = fewest(_estimate(call, block_means(call.query[0].float()), means, _seen_blocks(call)))
    kept, recall, visible_keys = (torch.zeros(len(columns), dtype=torch.float64) for _ in range(3))
    for part in parts:
        rows, visible = call.softmax(call.scores(part, keys))[0], call.visible(part)[0].expand(len(columns), -1, -1)
        positions = _positions(call, part)
        chosen = torch.where(
            aware[:, None, None],
            _spread_blocks(blocks, part, rows.shape[-1]),
            lines[0][:, None] | _by_key(lines[1], positions, rows.shape[-1]),
        )
        chosen = chosen & visible
        mass = rows.sum(-1)
        recall += torch.where(mass > 0, (rows * chosen).sum(-1) / mass, 1.0).double().sum(1).cpu()
        kept += chosen.sum((1, 2)).cpu()
        visible_keys += visible.sum((1, 2)).cpu()
    columns_of = distance.double().cpu(), aware.double().cpu(), kept / visible_keys, recall / call.query.shape[2]
    return torch.stack(columns_of, -1)


def root_jsd(first: Tensor, second: Tensor) -> Tensor:
    """Root of the Jensen-Shannon divergence of distributions over the last axis, in nats."""
    first, second = first.double(), second.double()
    middle = (first + second) / 2
    parts = [(torch.xlogy(part, part) - torch.xlogy(part, middle)).sum(-1) for part in (first, second)]
    return ((parts[0] + parts[1]) / 2).clamp(min=0).sqrt()


def fewest(mass: Tensor) -> Tensor:
    """The fewest entries of the last axis that hold `GAMMA` of its sum, the one that crosses it included; bool."""
    order = mass.double().sort(dim=-1, descending=True, stable=True)
    before = order.values.cumsum(-1) - order.values
    enough = before < (GAMMA - _SLACK) * order.values.sum(-1, keepdim=True)
    return torch.zeros_like(enough).scatter_(-1, order.indices, enough)


def block_means(vectors: Tensor) -> Tensor:
    """`[heads, tokens, width]` → the mean of every block of tokens, `[heads, blocks, width]`."""
    return torch.stack([part.mean(1) for part in vectors.split(BLOCK, dim=1)], 1)


def pooled(values: Tensor, reduce: object) -> Tensor:
    """`[..., keys]` → `[..., blocks]`, a reduction of torch's over the keys of each block."""
    return torch.stack([reduce(part, -1) for part in values.split(BLOCK, dim=-1)], -1)  # type: ignore[operator]


def _estimate(call: Call, queries: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """softmax(q̄ · k̄) over the blocks that are seen: `[heads, queries, blocks]`."""
    scores = queries @ keys.transpose(1, 2) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores.masked_fill(~seen, HIDDEN).softmax(-1)


def _seen_blocks(call: Call) -> Tensor:
    """Whether any query of a block sees any key of another: `[heads or 1, blocks, blocks]`."""
    queries = [call.visible(slice(start, start + BLOCK))[0].any(1) for start in range(0, call.query.shape[2], BLOCK)]
    return pooled(torch.stack(queries, 1), torch.amax)


def _spread_blocks(blocks: Tensor, part: slice, num_keys: int) -> Tensor:
    """`[heads, blocks, blocks]` → entries of these queries `[heads, queries, keys]`."""
    rows = blocks[:, torch.arange(part.start, part.stop, device=blocks.device) // BLOCK]
    return rows.repeat_interleave(BLOCK, -1)[..., :num_keys]


def _positions(call: Call, part: slice) -> Tensor:
    first = call.first_position
    return torch.arange(first + part.start, first + part.stop, device=call.query.device)


def _by_key(chosen: Tensor, positions: Tensor, num_keys: int) -> Tensor:
    """Diagonals `[heads, distances]` → entries `[heads, queries, keys]`."""
    distances = positions[:, None] - torch.arange(num_keys, device=chosen.device)
    return chosen[:, distances.clamp(min=0)] & (distances >= 0)
