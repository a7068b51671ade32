"""How a branch joins the residual stream when a norm is involved.

Megatron-Core's layer asks its spec for a factory of `join(branch_and_bias, residual, dropout)`; these are factories
with a norm. Source: Megatron-Core fusions/fused_bias_dropout.py, transformer/transformer_layer.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

BranchAndBias = tuple[Tensor, Tensor | None]
Join = Callable[[BranchAndBias, Tensor, float], Tensor]


class NormedJoin(torch.nn.Module, ABC):
    """Base of the joins below.

    Args:
        config: sizes, precision and sequence parallelism of the norm.
        norm: its spec or class.
    """

    def __init__(self, config: TransformerConfig, norm: ModuleSpec | type) -> None:
        super().__init__()
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Join:
        """The join of this forward pass; there is no fused kernel for it."""

        def join(branch_and_bias: BranchAndBias, residual: Tensor, dropout: float) -> Tensor:
            branch, bias = branch_and_bias
            branch = branch if bias is None else branch + bias
            return self.join(F.dropout(branch, dropout, training), residual)

        return join

    @abstractmethod
    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """Both [S_local, B, H] → the new residual stream."""


class PostNorm(NormedJoin):
    """norm(residual + branch), the placement of the first transformers.

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762).
    """

    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """Both [S_local, B, H] → [S_local, B, H]."""
        return self.norm(residual + branch)


class BranchNorm(NormedJoin):
    """residual + norm(branch): with a norm before the branch too, the sandwich of CogView and Peri-LN.

    Source: Ding et al., CogView (arXiv 2105.13290); Kim et al., Peri-LN (arXiv 2502.02732).
    """

    @property
    def branch_norm(self) -> torch.nn.Module:
        """The module whose output is what the residual stream receives, for observers."""
        return self.norm

    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """Both [S_local, B, H] → [S_local, B, H]."""
        return residual + self.norm(branch)
