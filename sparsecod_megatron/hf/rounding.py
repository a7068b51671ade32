"""How far apart equal models may be: a multiple of the rounding that one of them shows in fp32.

A model in fp32 and in float64 differ by rounding alone, so their difference says how much of it there is. One fp32 pass
can be lucky where a few massive values decide all, so there are several, which start an ulp apart. In a module's output
every channel is judged by itself: what is allowed to a massive one would hide a wrong tensor in the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

FACTOR = 8.0
"""Largest difference, in units of the model's own rounding: two right passes sum in other orders and are 0.6 to 1.5
away, a tensor off by 1e-3 hundreds."""
CHANNEL_FACTOR = 16.0
"""The same for one channel of a module's output. A model has hundreds of thousands, and in one of them all passes have
little rounding where ours has much: SmolLM2-135M reached 14 times the largest of three, and 6 times that of six."""
FLOOR = 1e-6
"""Relative to the largest value: what both passes of a model share (rotary tables, norms in fp32) is not in its
rounding."""
PASSES = 6
"""In fp32. Each makes it less likely that all are lucky in the same channel."""
ULP = 2.0**-23


@contextmanager
def ulp_apart(model: Any, index: int) -> Iterator[None]:
    """While the block runs, pass `index` of an fp32 model starts from embeddings moved by an ulp; pass 0 does not."""
    generator = torch.Generator().manual_seed(index)

    def move(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        steps = torch.randint(-1, 2, output.shape, generator=generator).to(output.device)
        return output * (1 + ULP * steps)

    handle = model.get_input_embeddings().register_forward_hook(move) if index else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def limit_of(*, noise: float, largest: float) -> float:
    """Largest difference that rounding explains.

    Args:
        noise: largest difference between a model's fp32 passes and its float64 pass.
        largest: largest absolute value.
    """
    return max(FACTOR * noise, FLOOR * largest)


def channel_limits(noise: Tensor, largest: Tensor) -> Tensor:
    """Largest difference of each channel that rounding explains, [channels].

    Args:
        noise: largest difference of each channel between the fp32 passes and the float64 pass, [channels].
        largest: largest absolute value of each channel, [channels].
    """
    scale = torch.maximum(largest, largest.median())
    typical = (noise / scale.clamp_min(torch.finfo(scale.dtype).tiny)).median()
    return torch.maximum(CHANNEL_FACTOR * torch.maximum(noise, typical * scale), FLOOR * scale)
