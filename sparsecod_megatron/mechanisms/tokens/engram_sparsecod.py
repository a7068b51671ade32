"""Engram's formulas, and the memory in an exported model's layers, as `engram.py` trains it.

The formulas are the training model's too. Tensors are [chunks, tokens, B, ...]: chunks are what context parallelism
makes of a sequence there, and the sequences of a batch here, where B is 1. `tokens` hold id and position in the
document, int64, with id -1 where there is no token.

Source: Cheng et al., Conditional Memory via Scalable Lookup (arXiv 2601.07372); hash, gate and convolution were read in
AI-Hypercomputer/maxtext, src/maxtext/layers/engram.py.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TAPS = 4
"""Tokens that the convolution weighs."""
HASH_BITS = 62
"""Products of ids and multipliers stay below two to the power of it."""
SMALLEST_SCORE = 1e-6
"""Below it the square root of a score would have too large a gradient."""


def halo_of(max_ngram: int) -> int:
    """Tokens before its own that a token's memory depends on: those of the n-gram at the convolution's last tap."""
    return max_ngram - 1 + max_ngram * (TAPS - 1)


def multipliers(seed: int, layer: int, max_ngram: int, vocab_size: int) -> list[int]:
    """An odd number for each place in an n-gram, whose product with any id has at most `HASH_BITS` bits."""
    bound = (1 << HASH_BITS) // vocab_size // 2
    digests = [hashlib.sha256(f"engram {seed} {layer} {place}".encode()).digest() for place in range(max_ngram)]
    return [int.from_bytes(digest[:8], "little") % bound * 2 + 1 for digest in digests]


def table_sizes(table_size: int, tables: int, heads: int) -> list[list[int]]:
    """Rows of each head of each table: the next primes from `table_size` on, each used once."""
    sizes: list[int] = []
    candidate = table_size
    while len(sizes) < tables * heads:
        if all(candidate % divisor for divisor in range(2, math.isqrt(candidate) + 1)):
            sizes.append(candidate)
        candidate += 1
    return [sizes[table * heads : (table + 1) * heads] for table in range(tables)]


def table_rows(tokens: Tensor, canonical: Tensor, factors: list[int], sizes: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Which rows the n-grams of each token stand in; the tables of all heads lie one below the other.

    Args:
        tokens: [chunks, N - 1 + tokens, B, 2].
        canonical: id of a token → of all that are written alike, [V].
        factors: N multipliers.
        sizes: rows of each head, for n-grams of 2, 3, … N tokens.

    Returns:
        Rows [chunks, tokens, B, (N - 1) · heads]; and whether the n-gram is whole, within one document: 1 or 0 in the
        same shape, bool.
    """
    ids, positions = tokens.unbind(-1)
    names = canonical.long()[ids.clamp(min=0)]
    last = len(factors) - 1
    own = slice(last, ids.shape[1])
    mixed, whole = names[:, own] * factors[0], ids[:, own] >= 0
    rows, valid, offset = [], [], 0
    for lag, primes in enumerate(sizes, start=1):
        before = slice(last - lag, ids.shape[1] - lag)
        mixed = mixed ^ (names[:, before] * factors[lag])
        whole = whole & (ids[:, before] >= 0) & (positions[:, own] >= lag)
        for prime in primes:
            rows.append(mixed % prime + offset)
            valid.append(whole)
            offset += prime
    return torch.stack(rows, dim=-1), torch.stack(valid, dim=-1)


def gate_of(query: Tensor, key: Tensor) -> Tensor:
    """How much of its memory a token takes: [..., H] normalised query and key → [..., 1]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    score = (query.to(wide) * key.to(wide)).sum(-1, keepdim=True) / math.sqrt(query.shape[-1])
    return torch.sigmoid(score.sign() * score.abs().clamp_min(SMALLEST_SCORE).sqrt()).to(query.dtype)


def smoothed(x: Tensor, taps: Tensor, positions: Tensor, dilation: int) -> Tensor:
    """SiLU of a causal convolution of every channel by itself, over the tokens of a document.

    Args:
        x: [chunks, dilation · (TAPS - 1) + tokens, B, H].
        taps: weights, [TAPS · H], of the token itself first.
        positions: of the tokens in their documents, [chunks, tokens, B].
        dilation: tokens between two taps.

    Returns:
        [chunks, tokens, B, H].
    """
    reach, weights = dilation * (TAPS - 1), taps.view(TAPS, -1)
    total = x[:, reach:] * weights[0]
    for tap in range(1, TAPS):
        lag = dilation * tap
        earlier = x[:, reach - lag : x.shape[1] - lag] * weights[tap]
        total = total + torch.where(positions[..., None] >= lag, earlier, 0)
    return F.silu(total)


def extend(layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
    """Give a layer its memory."""
    if index in settings["layers"]:
        layer.memory = Memory(settings, config, index)
        layer.token_halo = max(halo_of(settings["max_ngram"]), layer.token_halo or 0)


class Memory(nn.Module):
    """What a layer adds to its input: what is known of the n-grams that end at each token.

    Args:
        settings: of the mechanism.
        config: of the model.
        index: of the layer, from 0.
    """

    canonical: Tensor

    def __init__(self, settings: dict[str, Any], config: Any, index: int) -> None:
        super().__init__()
        self.max_ngram, heads = settings["max_ngram"], settings["heads"]
        orders, hidden = self.max_ngram - 1, config.hidden_size
        self.factors = multipliers(settings["seed"], index, self.max_ngram, config.vocab_size)
        place = settings["layers"].index(index) * orders
        sizes = table_sizes(settings["table_size"], len(settings["layers"]) * orders, heads)
        self.sizes = sizes[place : place + orders]
        self.table = nn.Embedding(sum(map(sum, self.sizes)), settings["width"] // heads)
        self.key = nn.Linear(orders * settings["width"], hidden, bias=False)
        self.value = nn.Linear(orders * settings["width"], hidden, bias=False)
        self.query_norm, self.key_norm, self.value_norm = (nn.RMSNorm(hidden, config.rms_norm_eps) for _ in range(3))
        self.taps = nn.Parameter(torch.zeros(TAPS * hidden))
        self.register_buffer("canonical", torch.arange(config.vocab_size, dtype=torch.int32))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """[batch, seq, hidden], and tokens as the model gives them → [batch, seq, hidden]."""
        length, reach = x.shape[1], self.max_ngram * (TAPS - 1)
        tokens = tokens[:, -(halo_of(self.max_ngram) + length) :, None]
        rows, valid = table_rows(tokens, self.canonical, self.factors, self.sizes)
        found = self.table(rows.squeeze(2)).to(x.dtype) * valid.squeeze(2)[..., None]
        memory = found.transpose(-1, -2).flatten(start_dim=-2)
        value = self.value(memory)
        gate = gate_of(self.query_norm(x), self.key_norm(self.key(memory[:, reach:])))
        earlier = smoothed(
            self.value_norm(value).unsqueeze(2), self.taps, tokens[:, -length:, :, 1], self.max_ngram
        ).squeeze(2)
        return gate * value[:, reach:] + earlier
