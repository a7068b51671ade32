"""The exact k-th smallest magnitude over many tensors, in two streaming passes and 256 KiB of counts.

The bit pattern of a non-negative fp32 number, read as an integer, orders like the number. So the upper 16 bits are
counted first; the bin that holds the k-th value is then counted by its lower 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 22
_HALF_BITS = 16
_BINS = 1 << _HALF_BITS


def kth_magnitudes(tensors: Sequence[Tensor], ks: Sequence[int]) -> list[float]:
    """The k-th smallest |w| over all tensors together, for every k.

    Args:
        tensors: floating point, any shapes; fp16, bf16 and fp32 are represented exactly.
        ks: ranks from 1 to the number of elements; 0 gives -1, below every magnitude.

    Returns:
        One magnitude per rank. Elements `|w| <= magnitude` are at least k, more only where values tie.
    """
    upper = _count(bits >> _HALF_BITS for bits in _bit_chunks(tensors))
    cumulative = upper.cumsum(0)
    assert all(0 <= k <= int(cumulative[-1]) for k in ks), "rank outside the number of elements"
    bins = [int(torch.searchsorted(cumulative, k)) for k in ks]
    lower = _count_within(tensors, sorted(set(bins)))
    return [_value(k, cell, cumulative, upper, lower) if k else -1.0 for k, cell in zip(ks, bins, strict=True)]


def _value(k: int, cell: int, cumulative: Tensor, upper: Tensor, lower: dict[int, Tensor]) -> float:
    """The magnitude of rank k, which lies in bin `cell` of the upper halves."""
    rank = k - int(cumulative[cell] - upper[cell])
    low = int(torch.searchsorted(lower[cell].cumsum(0), rank))
    return float(torch.tensor((cell << _HALF_BITS) | low, dtype=torch.int32).view(torch.float32))


def _count_within(tensors: Sequence[Tensor], cells: Sequence[int]) -> dict[int, Tensor]:
    """Counts of the lower halves of those values whose upper half is one of `cells`."""
    counts = {cell: torch.zeros(_BINS, dtype=torch.int64) for cell in cells}
    for bits in _bit_chunks(tensors):
        upper = bits >> _HALF_BITS
        for cell in cells:
            counts[cell] += _count([bits[upper == cell] & (_BINS - 1)])
    return counts


def _count(chunks: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(_BINS, dtype=torch.int64)
    for chunk in chunks:
        total += torch.bincount(chunk, minlength=_BINS).cpu()
    return total


def _bit_chunks(tensors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Magnitudes as int32 bit patterns, a bounded number at a time."""
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).split(_CHUNK):
            yield chunk.float().abs().view(torch.int32)
