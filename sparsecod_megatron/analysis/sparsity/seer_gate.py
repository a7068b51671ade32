"""A learned gate that tells which blocks of keys a query will attend to, trained on the attention of a frozen model.

Every attention gets one. With q̄ the mean of the last 64 queries up to a query at position t, and k_j the maximum,
minimum and mean of the keys of block j, each channel by itself and side by side,

    s_j = rope(W_q q̄, t div 64) · rope(W_k k_j, j) / √d        for blocks that are over: j < t div 64

W_q for each head and W_k for each key head, of width d = 128, turned by the number of their block. The target is the
largest weight between those 64 queries and the block's keys, divided by its sum over the blocks; the loss is the
divergence KL(target ‖ softmax(s)), summed over blocks, averaged over queries and heads. The own block is always kept
and is not the gate's business, so that nothing later than a query has a say in what it keeps.

The published gate differs: it pools whole blocks of queries, which shows early queries later ones; takes queries and
keys before their rotation, which only a model's own code knows; and neither divides the target by its sum nor the loss
by rows alone, so that it grows with the number of blocks.

Source: Gao et al., SeerAttention (arXiv 2410.13276).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsecod_megatron.analysis.sparsity.attention import Call, RowAttention
from sparsecod_megatron.analysis.sparsity.selection import BLOCK, PROBE, Order, Rows, block_order
from sparsecod_megatron.analysis.sparsity.sparse_rows import MAX_SPARSE_SCORES

WIDTH = 128
ROPE_BASE = 10000.0
LEARNING_RATE = 1e-3
WARMUP_STEPS = 20
MAX_WINDOWS = 64
"""Windows of 64 queries of a sequence that the gate learns from, at most."""


class Features(NamedTuple):
    """What the gate of one attention reads and should say, for windows of queries of some sequences.

    Attributes:
        queries: `[sequences, heads, windows, head width]`, means.
        keys: `[sequences, key heads, blocks, 3 · head width]`.
        target: `[sequences, heads, windows, blocks]`, 0 for blocks that are not over.
    """

    queries: Tensor
    keys: Tensor
    target: Tensor


def window_ends(length: int) -> Tensor:
    """Positions of the last query of each window; all have a block before their own."""
    return torch.arange(length - 1, BLOCK - 1, -max(1, math.ceil((length - BLOCK) / MAX_WINDOWS))).flip(0)


class GateFeatures(RowAttention):
    """The model's own attention, which takes the features of every attention in passing."""

    def __init__(self, blocks: Iterable[nn.Module], max_scores: int = MAX_SPARSE_SCORES) -> None:
        super().__init__(blocks, max_scores)
        self.found: dict[nn.Module, Features] = {}
        """Those of the last pass, in the order of the calls, on the CPU."""

    def attend(self, layer: int | None, module: nn.Module, call: Call) -> Tensor:
        """See `RowAttention`."""
        if layer is not None:
            features = [sequence_features(one, list(self.parts(one))) for one in call.sequences()]
            self.found[module] = Features(*(torch.stack(column) for column in zip(*features, strict=True)))
        return super().attend(layer, module, call)


def sequence_features(call: Call, parts: Sequence[slice]) -> Features:
    """Features of one sequence, without the axis of sequences, on the CPU.

    Args:
        call: of that sequence.
        parts: its queries in parts whose rows may be held.
    """
    keys = call.spread_over_heads(call.key)
    largest = []  # of each query in each block
    for part in parts:
        weights = call.softmax(call.scores(part, keys))[0]
        largest.append(torch.stack([block.amax(-1) for block in weights.split(BLOCK, dim=-1)], -1))
    ends = window_ends(call.query.shape[2]).to(call.query.device)
    windows = torch.cat(largest, 1).unfold(1, PROBE, 1).amax(-1)[:, ends - (PROBE - 1)]
    is_over = torch.arange(windows.shape[-1], device=ends.device) < ends[:, None] // BLOCK
    target = windows * is_over
    target = target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(target.dtype).tiny)
    queries = window_means(call.query[0].float())[:, ends]
    return Features(*(part.cpu() for part in (queries, block_keys(call.key[0].float()), target)))


def window_means(queries: Tensor) -> Tensor:
    """`[heads, queries, width]` → the mean of the last `PROBE` up to each."""
    sums = F.pad(queries.double().cumsum(1), (0, 0, 1, 0))
    ends = torch.arange(1, sums.shape[1], device=queries.device)
    starts = (ends - PROBE).clamp(min=0)
    return ((sums[:, ends] - sums[:, starts]) / (ends - starts)[:, None]).to(queries.dtype)


def block_keys(keys: Tensor) -> Tensor:
    """`[key heads, keys, width]` → maximum, minimum and mean of each block, `[key heads, blocks, 3 · width]`."""
    blocks = [torch.cat([part.amax(1), part.amin(1), part.mean(1)], -1) for part in keys.split(BLOCK, dim=1)]
    return torch.stack(blocks, 1)


class Gate(nn.Module):
    """The gate of one attention, random.

    Args:
        features: its attention's, which fix sizes and the scale of its inputs.
        generator: draws the matrices.
    """

    def __init__(self, features: Features, generator: torch.Generator) -> None:
        super().__init__()
        self.scales = [float(part.square().mean().sqrt().clamp(min=1e-9)) for part in features[:2]]
        shapes = [(part.shape[1], part.shape[-1], WIDTH) for part in features[:2]]
        matrices = [torch.randn(shape, generator=generator) * shape[1] ** -0.5 for shape in shapes]
        self.query, self.key = (nn.Parameter(matrix) for matrix in matrices)

    def forward(self, queries: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Scores of blocks, −inf for those that are not over: `[..., heads, windows, blocks]`.

        Args:
            queries: `[..., heads, windows, head width]`.
            keys: `[..., key heads, blocks, 3 · head width]`.
            positions: `[windows]` of each window's last query.
        """
        blocks = torch.arange(keys.shape[-2], device=keys.device)
        query = _rotated(queries / self.scales[0] @ self.query, positions // BLOCK)
        key = _rotated(keys / self.scales[1] @ self.key, blocks)
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        scores = query @ key.mT / math.sqrt(WIDTH)
        return scores.masked_fill(blocks >= positions[:, None] // BLOCK, -torch.inf)


def _rotated(x: Tensor, places: Tensor) -> Tensor:
    """`[..., places, WIDTH]` turned by place, channel i with channel i + WIDTH / 2."""
    frequencies = ROPE_BASE ** (-torch.arange(0, WIDTH, 2, device=x.device) / WIDTH)
    angles = places[:, None] * frequencies
    first, second = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def divergence(gate: Gate | None, features: Features, length: int) -> Tensor:
    """Mean KL of target and gate over sequences, heads and windows, in nats; without a gate, of an even guess.

    Args:
        gate: of the attention.
        features: of the attention.
        length: tokens of the sequences.
    """
    ends = window_ends(length).to(features.target.device)
    is_over = torch.arange(features.target.shape[-1], device=ends.device) < ends[:, None] // BLOCK
    if gate is None:
        scores = torch.zeros_like(features.target).masked_fill(~is_over, -torch.inf)
    else:
        scores = gate(features.queries, features.keys, ends)
    logs = scores.log_softmax(-1).masked_fill(~is_over, 0)
    target = features.target
    return (torch.xlogy(target, target) - target * logs).sum(-1).mean()


def train_gates(features: Sequence[Features], length: int, *, steps: int, seed: int) -> list[Gate]:
    """Gates of all attentions, by AdamW without decay, a warm-up and a cosine, on all windows in every step.

    Args:
        features: of each attention, on the device to train on.
        length: tokens of the sequences.
        steps: of the optimizer.
        seed: of the fresh matrices.
    """
    generator = torch.Generator().manual_seed(seed)
    gates = [Gate(part, generator).to(part.queries.device) for part in features]
    parameters = [parameter for gate in gates for parameter in gate.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP_STEPS) * (1 + math.cos(math.pi * step / steps)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    with torch.enable_grad():
        for _ in range(steps):
            for gate, part in zip(gates, features, strict=True):
                divergence(gate, part, length).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return gates


class GatePattern:
    """Ranks whole blocks of keys by gates, the query's own block first; a `selection.Pattern`.

    Args:
        gates: by attention.
    """

    def __init__(self, gates: Mapping[nn.Module, Gate]) -> None:
        self._gates = gates

    @torch.no_grad()
    def __call__(self, rows: Rows) -> Order:
        """See `selection.Pattern`."""
        queries = window_means(rows.call.query[0].float())[:, rows.part]
        scores = self._gates[rows.module](queries, block_keys(rows.call.key[0].float()), rows.positions)
        return block_order(scores[None], rows)
