"""RMSNorm as a module of a layer spec; Megatron's own wrapper of torch's norms refuses sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sparsecod_megatron.backend import functional


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the last axis.

    Args:
        config: tells whether the sequence is sharded, in which case each tensor-parallel rank sees other tokens and
            Megatron must sum this weight's gradient over the group (`weight.sequence_parallel`).
        hidden_size: size of the last axis.
        eps: added to the mean square.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """[S_local, B, H] → [S_local, B, H]."""
        return functional.rms_norm(x, self.weight, self.eps)


class ScaledRMSNorm(RMSNorm):
    """scale · RMSNorm(x), with a constant scale: 1 / sqrt(l + 1) in layer l makes it LayerNorm scaling.

    The weight stays at 1 when the model is made, so that weight decay and checkpoints see what they see without.

    Source: Sun et al., The Curse of Depth in Large Language Models (arXiv 2502.05795).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, scale: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """[S_local, B, H] → [S_local, B, H]."""
        normed = super().forward(x)
        return normed if self.scale == 1.0 else self.scale * normed
