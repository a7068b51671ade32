"""Values where a mask is set, changed block by block: what hard and soft masks do in every step.

torch's `masked_fill` looks at one weight after another on a CPU and took 31 ms for 8.4M of them, a product took 3;
a mask as numbers is four times the mask's size, and is made block by block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecod_megatron.mechanisms.weights.engine.blocks import blocks

INTEGER_TYPES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a value."""


def zero_(values: Tensor, marked: Tensor) -> None:
    """Zeros where marked, whatever stood there (infinities too).

    Args:
        values: contiguous, changed in place.
        marked: bool, of the same shape.
    """
    if values.is_cuda:
        values.masked_fill_(marked, 0.0)
        return
    _clear(values, marked, values)


def zeroed(values: Tensor, marked: Tensor) -> Tensor:
    """A copy with zeros where marked.

    Args:
        values: contiguous.
        marked: bool, of the same shape.
    """
    if values.is_cuda:
        return values.masked_fill(marked, 0.0)
    result = torch.empty_like(values)
    _clear(values, marked, result)
    return result


def scale_(values: Tensor, marked: Tensor, factor: float) -> None:
    """A product with the factor where marked.

    Args:
        values: contiguous, changed in place.
        marked: bool, of the same shape.
        factor: of marked values.
    """
    for numbers, block in numbered(marked, values):
        block.mul_(numbers.to(block.dtype).mul_(factor - 1).add_(1))


def add_(values: Tensor, marked: Tensor, other: Tensor, factor: float) -> None:
    """Plus factor · other where marked.

    Args:
        values: contiguous, changed in place.
        marked: bool, of the same shape.
        other: of the same shape.
        factor: of what is added.
    """
    for numbers, block, addend in numbered(marked, values, other):
        block.addcmul_(addend, numbers.to(block.dtype), value=factor)


def _clear(values: Tensor, marked: Tensor, result: Tensor) -> None:
    integers = INTEGER_TYPES[values.element_size()]
    for numbers, block, target in numbered(marked, values.view(integers), result.view(integers)):
        # −1, all bits, keeps a value and 0 clears it; a product with 0 would make NaN of infinities.
        torch.bitwise_and(block, numbers.to(integers).sub_(1), out=target)


def numbered(marked: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of each block: marks as 0 or 1, and the others.

    Args:
        marked: bool.
        others: contiguous, of the same shape.
    """
    return blocks(marked.contiguous().view(torch.int8), *others)
