"""How a branch joins the residual stream when a norm is involved, or a mechanism has a residual path of its own.

Megatron-Core's layer asks its spec for a factory of `join(branch_and_bias, residual, dropout)`; these are such
factories. Source: Megatron-Core fusions/fused_bias_dropout.py, transformer/transformer_layer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sparsecod_megatron.seams.residual import ResidualPath

BranchAndBias = tuple[Tensor, Tensor | None]
Join = Callable[[BranchAndBias, Tensor, float], Tensor]


def owned(module: torch.nn.Module, config: TransformerConfig) -> torch.nn.Module:
    """A path's module with parameters as Megatron-Core wants them: the run's type, and the marks of what is whole.

    Under sequence parallelism each tensor-parallel rank sees other tokens, so gradients are summed over the group;
    Muon, which would orthogonalise mixing matrices, leaves what is marked as an embedding to AdamW.
    """
    module.to(config.params_dtype)
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        parameter.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]
    return module


class BranchJoin(torch.nn.Module):
    """residual + branch, or the join of a residual path; base of those with a norm.

    Args:
        config: of the model.
        path: of a mechanism; None for the plain sum.
        sublayer: which of its joins.
    """

    def __init__(self, config: TransformerConfig, path: ResidualPath | None = None, sublayer: int = 0) -> None:
        super().__init__()
        self.write = None if path is None else owned(path.join(sublayer), config)
        if path is not None:
            self.view = path.view

    def forward(self, training: bool, fused: bool) -> Join:
        """The join of this forward pass; there is no fused kernel for it."""

        def join(branch_and_bias: BranchAndBias, residual: Tensor, dropout: float) -> Tensor:
            branch, bias = branch_and_bias
            branch = branch if bias is None else branch + bias
            return self.join(F.dropout(branch, dropout, training), residual)

        return join

    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """[S_local, B, H] and the residual state [S_local, B, columns · H] → the next state."""
        state: Tensor = residual + branch if self.write is None else self.write(branch, residual)
        return state


class ScaledJoin(BranchJoin):
    """residual + factor · branch.

    Args:
        config: of the model.
        factor: a constant.
    """

    def __init__(self, config: TransformerConfig, *, factor: float) -> None:
        super().__init__(config)
        self.factor = factor

    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """Both [S_local, B, H] → [S_local, B, H]."""
        return super().join(self.factor * branch, residual)


class ParallelStart(BranchJoin):
    """x and x + branch side by side: the other branch of a parallel layer reads x, and is added to the sum.

    One tensor, so that what recomputes, offloads or captures a part of the layer sees all that follows from it.
    """

    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """Both [S_local, B, H] → [S_local, B, 2 · H]."""
        return torch.cat((residual, super().join(branch, residual)), dim=-1)


class ParallelEnd(BranchJoin):
    """The second of what `ParallelStart` gave, and the branch."""

    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """[S_local, B, H] and [S_local, B, 2 · H] → [S_local, B, H]."""
        return super().join(branch, residual.chunk(2, dim=-1)[1])


class LayerInput(torch.nn.Module):
    """The first of what `ParallelStart` gave; stands before a linear layer with a norm of its own, or in a norm."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @property
    def read(self) -> torch.nn.Module:
        """The module whose output the branch reads, for observers."""
        return self

    def forward(self, state: Tensor) -> Tensor:
        """[S_local, B, 2 · H] → [S_local, B, H]."""
        return state.chunk(2, dim=-1)[0].contiguous()


class NormedJoin(BranchJoin):
    """Base of the joins with a norm.

    Args:
        config: sizes, precision and sequence parallelism of the norm.
        norm: its spec or class.
        path: of a mechanism; None for the plain sum.
        sublayer: which of its joins.
    """

    def __init__(
        self,
        config: TransformerConfig,
        norm: ModuleSpec | type,
        path: ResidualPath | None = None,
        sublayer: int = 0,
    ) -> None:
        super().__init__(config, path, sublayer)
        self.norm = build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class PostNorm(NormedJoin):
    """norm(residual + branch), the placement of the first transformers.

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762).
    """

    def join(self, branch: Tensor, residual: Tensor) -> Tensor:
        """Both [S_local, B, H] → [S_local, B, H]."""
        return self.norm(super().join(branch, residual))


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
        return super().join(self.norm(branch), residual)
