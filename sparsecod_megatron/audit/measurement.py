"""What is recorded of a row, and compared. Needs no Megatron-Core."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Measurement:
    """What a row did; gradients, weights and buffers on rank 0 alone.

    Attributes:
        losses: nats per token, by step.
        grad_norms: norms of the whole gradient before clipping, by step.
        statistics: by step and layer.
        gradients: name in the whole model → reduced gradient before clipping, fp32, by step.
        states: steps done → name in the whole model → weights, their fp32 masters, and buffers; at the end, and in the
            middle, after what the row does there (resume, validation).
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    statistics: list[list[dict[str, Any]]] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)
