"""Exactly k of many weights, over all processes: the largest scores of each row, without sorting or gathering them.

A score's bits are read a byte at a time, from the highest: each round counts, in every row, how often each value of the
byte occurs among the scores whose higher bytes are the threshold's so far, adds the counts up over all processes, and
walks down to the value in which the k-th largest lies. Four rounds give its 32 bits, whatever the layout. Scores equal
to it are taken in the order of a hash of each weight's place in the whole model, so that the number is exact also where
many are zero: an expert without tokens has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.mechanisms.weights.engine.blocks import blocks

BYTE_VALUES = 256
HISTOGRAM_SLOTS = BYTE_VALUES + 2
"""A byte's values, and what is below and above them."""
NO_CANDIDATE = -1
"""The key of what cannot be chosen; all others are at least 0."""


def magnitude_keys(values: Tensor, candidates: Tensor | None = None) -> Tensor:
    """Keys in the order of magnitudes, int32: the bits of a non-negative fp32 number sort as it does.

    Args:
        values: finite, of any floating-point type.
        candidates: which of them may be chosen; None is all.
    """
    keys = values.detach().float().abs().contiguous().view(torch.int32)
    return keys if candidates is None else keys.masked_fill(~candidates, NO_CANDIDATE)


def random_keys(positions: Tensor, seed: int, candidates: Tensor | None = None) -> Tensor:
    """Keys in a random order, int32, that belong to a weight's place and a seed, in any layout.

    Args:
        positions: int64, of each weight in the whole model.
        seed: 63 bits.
        candidates: as `magnitude_keys`.
    """
    keys = (hashed(positions ^ seed) >> 32).to(torch.int32)
    return keys if candidates is None else keys.masked_fill(~candidates, NO_CANDIDATE)


def hashed(values: Tensor) -> Tensor:
    """A permutation of the 64-bit integers without visible order, less the sign, which two of them share.

    Source: Steele et al., Fast Splittable Pseudorandom Number Generators (OOPSLA 2014), the finalizer of SplitMix64.
    """
    mixed = values + -7046029254386353131  # 0x9E3779B97F4A7C15, which int64 holds as a negative number
    mixed = (mixed ^ _shifted(mixed, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    mixed = (mixed ^ _shifted(mixed, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return (mixed ^ _shifted(mixed, 31)) & 0x7FFF_FFFF_FFFF_FFFF


def _shifted(values: Tensor, bits: int) -> Tensor:
    """Shifted to the right, zeros coming in; `>>` repeats the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def largest(
    keys: Sequence[Tensor],
    rows: Sequence[int],
    counts: Tensor,
    positions: Callable[[int], Tensor],
) -> list[Tensor]:
    """Choose exactly `counts` of each row, the largest keys first. Collective over all processes.

    Args:
        keys: this process's parts, flat, int32, at least 0 or `NO_CANDIDATE`; no weight is in two of all processes'.
        rows: of each part.
        counts: how many of each row, [rows] int64, the same on every process; no more than there are candidates.
        positions: place in the whole model of each weight of a part, for ties.

    Returns:
        Which are chosen, bool, part by part.
    """
    threshold, needed, ties = _threshold(keys, rows, counts, key_bytes=4)
    # The one wait for the device of a choice, at the steps where marks change: ties are rare but for zeros.
    if not bool((ties > needed).any()):
        return [(part >= threshold[row]) & (part >= 0) for part, row in zip(keys, rows, strict=True)]
    chosen = [part > threshold[row] for part, row in zip(keys, rows, strict=True)]
    equal = [(part == threshold[row]).nonzero().squeeze(1) for part, row in zip(keys, rows, strict=True)]
    order = [hashed(positions(index)[ties]) if len(ties) else ties for index, ties in enumerate(equal)]
    limit, _, _ = _threshold(order, rows, needed, key_bytes=8)
    for part, ties, places, row in zip(chosen, equal, order, rows, strict=True):
        part[ties] = (places >= limit[row]) & (needed[row] > 0)
    return chosen


def _threshold(
    keys: Sequence[Tensor], rows: Sequence[int], counts: Tensor, *, key_bytes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The counts-th largest key of each row. Collective over all processes.

    Returns:
        It, how many of the keys equal to it are needed, and how many such keys there are; each [rows] int64.
    """
    prefix, remaining = torch.zeros_like(counts), counts.clone()
    found = torch.zeros_like(counts)
    one = torch.ones(1, dtype=torch.int64, device=counts.device)
    for shift in range(8 * (key_bytes - 1), -1, -8):
        histogram = torch.zeros(len(counts), HISTOGRAM_SLOTS, dtype=torch.int64, device=counts.device)
        for part, row in zip(keys, rows, strict=True):
            for (block,) in blocks(part):
                # What differs in a higher byte is below 0 or above 255, and is counted in the first or the last slot.
                slots = ((block >> shift) - (prefix[row] << 8)).clamp_(-1, BYTE_VALUES).add_(1)
                histogram[row].index_add_(0, slots, one.expand(slots.shape))
        dist.all_reduce(histogram)
        # Number of keys whose byte is at least 255, 254, …
        above = histogram[:, 1:-1].flip(1).cumsum(1)
        place = (above < remaining[:, None]).sum(1, keepdim=True).clamp(max=BYTE_VALUES - 1)
        bigger = torch.where(place > 0, above.gather(1, (place - 1).clamp(min=0)), 0)
        found = (above.gather(1, place) - bigger).squeeze(1)
        remaining = remaining - bigger.squeeze(1)
        prefix = (prefix << 8) | (BYTE_VALUES - 1 - place.squeeze(1))
    # Of a row from which nothing is taken the walk stops at a key that there cannot be, which int32 may not hold.
    nothing = counts == 0
    return prefix.masked_fill(nothing, (1 << (8 * key_bytes - 1)) - 1), remaining, found.masked_fill(nothing, 0)
