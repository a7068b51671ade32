"""Which pattern the last queries of a sequence suggest for each head, and what that pattern keeps of all queries.

With α the weights of the last 128 queries (the probe) and blocks of 64 keys, the estimate of a head is
softmax(q̄ · k̄_b + log n_b), q̄ the mean query of the probe, k̄_b the mean key of a block and n_b how many of its keys the
probe sees; its truth is the mass of α in each block. √JSD is the root of their Jensen-Shannon divergence in nats, 0 to
√log 2 = 0.83. A head below 0.1 is `query_aware`: blocks can be chosen by pooled queries and keys, and every block of 64
queries keeps the fewest blocks with γ = 0.9 of its estimate. Any other head is `vertical_slash`: it keeps the fewest
lines, columns and diagonals together, that cover γ of the probe's mass.

The share that is kept counts keys that the mask lets a query see, and recall is the share of the true mass of all
queries, not only of the probe. The probe stands at the end: this says what a sequence looks like, and is not an
attention that could be run causally.

FlexPrefill's own code differs: it takes diagonals at multiples of 128 alone, columns and diagonals each for themselves,
leaves n_b out, divides by all n² entries, pools the mass of all blocks of queries, drops the element that crosses γ,
and keeps at least 512 tokens.

Source: Lai et al., FlexPrefill (arXiv 2502.20766).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.sparsity.attention import Call, RowAttention
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
    means = block_means(keys[0])
    pooled_query = call.query[0, :, probe].float().mean(1, keepdim=True)
    estimate = _estimate(call, pooled_query, means, [probe])[:, 0]
    truth = torch.stack([part.sum((1, 2)) for part in weights.split(BLOCK, dim=-1)], -1)
    distance = root_jsd(estimate, truth / truth.sum(-1, keepdim=True))
    aware = distance < TAU
    lines = heaviest_lines(weights, _positions(call, probe))
    each = [slice(start, start + BLOCK) for start in range(0, call.query.shape[2], BLOCK)]
    blocks = fewest(_estimate(call, block_means(call.query[0].float()), means, each))
    kept, recall, visible_keys = (torch.zeros(len(weights), dtype=torch.float64) for _ in range(3))
    for part in parts:
        rows, visible = call.softmax(call.scores(part, keys))[0], call.visible(part)[0].expand(len(weights), -1, -1)
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
    found = distance.double().cpu(), aware.double().cpu(), kept / visible_keys, recall / call.query.shape[2]
    return torch.stack(found, -1)


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


def heaviest_lines(weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and diagonals, the heaviest first, until those together cover `GAMMA` of the mass of some rows.

    Args:
        weights: `[heads, queries, keys]`.
        positions: `[queries]` of the queries among the keys.

    Returns:
        Which columns and which distances: two of `[heads, keys]` bool.
    """
    columns, diagonals = weights.double().sum(1), by_distance(weights, positions).double().sum(1)
    distances = positions[:, None] - torch.arange(weights.shape[-1], device=weights.device)
    of_entry = diagonals[:, distances.clamp(min=0)].masked_fill(distances < 0, 0)
    heaviest = torch.maximum(of_entry, columns[:, None]).flatten(1)  # the line that takes an entry in
    order = heaviest.sort(dim=-1, descending=True)
    covered = weights.double().flatten(1).gather(1, order.indices).cumsum(-1)
    enough = (covered >= (GAMMA - _SLACK) * covered[:, -1:]).int().argmax(-1, keepdim=True)
    lightest = order.values.gather(1, enough)
    return columns >= lightest, diagonals >= lightest


def _estimate(call: Call, queries: Tensor, keys: Tensor, of: list[slice]) -> Tensor:
    """softmax(q̄ · k̄ + log n) over blocks of keys, n those that the queries see: `[heads, queries, blocks]`.

    Args:
        call: of one sequence.
        queries: `[heads, queries, width]`, means of those in `of`.
        keys: `[heads, blocks, width]`, means.
        of: the queries that each was made of.
    """
    scores = queries @ keys.transpose(1, 2) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    seen = torch.stack([call.visible(part)[0].sum(1) for part in of], 1)  # [heads or 1, queries, keys]
    counts = torch.stack([part.sum(-1) for part in seen.split(BLOCK, dim=-1)], -1)
    return (scores + counts.double().log()).softmax(-1)


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
