"""What reads the residual state of a mechanism in a Megatron-Core model, and what makes the first.

A layer reads the state in the places of its norms and writes it in its `*_bda` places (`model/residual.py`), so that
neither the layer nor the block is another. Contract: `seams/residual.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from sparsecod_megatron.model.residual import owned
from sparsecod_megatron.seams.residual import ResidualPath


class BareRead(torch.nn.Module):
    """read(state), where a model has no final norm.

    Args:
        config: of the model.
        hidden_size: H.
        eps: unused.
        path: whose state it reads.
        sublayer: which of its reads.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, *, path: ResidualPath, sublayer: int
    ) -> None:
        super().__init__()
        self.read, self.dtype = read_of(path, sublayer)(config), config.params_dtype

    def forward(self, state: Tensor) -> Tensor:
        """[S_local, B, columns · H] → [S_local, B, H]."""
        result: Tensor = self.read(state).to(self.dtype)
        return result


def read_of(path: ResidualPath, sublayer: int) -> Callable[[TransformerConfig], torch.nn.Module]:
    """What makes the module that a norm reads the state by."""

    def made(config: TransformerConfig) -> torch.nn.Module:
        read = path.read(sublayer)
        return torch.nn.Identity() if read is None else owned(read, config)

    return made


class Expansion(torch.nn.Module):
    """The first residual state.

    Args:
        config: of the model.
        path: whose state it is.
    """

    def __init__(self, config: TransformerConfig, path: ResidualPath) -> None:
        super().__init__()
        expansion = path.expansion()
        self.expand = torch.nn.Identity() if expansion is None else owned(expansion, config)
        self.dtype: Any = torch.float32 if path.state_in_fp32 else config.params_dtype

    def forward(self, embedded: Tensor) -> Tensor:
        """[S_local, B, H] → [S_local, B, columns · H]."""
        state: Tensor = self.expand(embedded.to(self.dtype))
        return state
