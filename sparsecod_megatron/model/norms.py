"""Norms as modules of a layer spec; Megatron's own wrapper of torch's norms refuses sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from sparsecod_megatron.backend import functional


class RMSNorm(torch.nn.Module):
    """scale · x / sqrt(mean(x²) + eps) · weight, over the last axis; with zero-centred weights 1 + weight, in fp32.

    A constant scale of 1 / sqrt(l + 1) in layer l makes it LayerNorm scaling: the weight stays at its start when the
    model is made, so that weight decay and checkpoints see what they see without.

    Args:
        config: tells whether the sequence is sharded, in which case each tensor-parallel rank sees other tokens and
            Megatron must sum the gradients of what is learned here over the group (`sequence_parallel`); and whether
            weights are zero-centred.
        hidden_size: size of the last axis.
        eps: added to the mean square.
        scale: constant factor.
        read: makes, of `config`, the module that gives x of a wider residual state; None where the state is x.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467); Sun et al., The Curse of Depth
    in Large Language Models (arXiv 2502.05795); zero-centred: transformers, models/gemma3/modeling_gemma3.py.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        *,
        scale: float = 1.0,
        read: Callable[[TransformerConfig], torch.nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.scale, self.is_zero_centred = eps, scale, config.layernorm_zero_centered_gamma
        self.read = None if read is None else read(config)
        start = torch.zeros if self.is_zero_centred else torch.ones
        self.weight = self._learned(start(hidden_size, dtype=config.params_dtype), config)

    def forward(self, state: Tensor) -> Tensor:
        """[S_local, B, H], or wider where it is read → [S_local, B, H]."""
        x = state if self.read is None else self.read(state).to(self.weight.dtype)
        normed = self.normed(x)
        return normed if self.scale == 1.0 else self.scale * normed

    def normed(self, x: Tensor) -> Tensor:
        """Without the factor, [..., H] → [..., H]."""
        if self.is_zero_centred:
            return functional.rms_norm(x.float(), 1 + self.weight.float(), self.eps).to(x.dtype)
        return functional.rms_norm(x, self.weight, self.eps)

    def _learned(self, values: Tensor, config: TransformerConfig) -> torch.nn.Parameter:
        parameter = torch.nn.Parameter(values)
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter


class LayerNorm(RMSNorm):
    """scale · ((x - mean(x)) / sqrt(var(x) + eps) · weight + bias), the variance being that over all H channels.

    Source: Ba et al., Layer Normalization (arXiv 1607.06450).
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        super().__init__(config, hidden_size, eps, **options)
        self.bias = self._learned(torch.zeros_like(self.weight), config)

    def normed(self, x: Tensor) -> Tensor:
        """Without the factor, [..., H] → [..., H]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


NORMS: dict[str, type[RMSNorm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
"""By `model.normalization`."""


class ProjectionRMSNorm(torch.nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, over the channels of all heads of queries or of keys.

    Tensor-parallel ranks hold the weights of their own heads, and sum the squares.

    Args:
        config: sizes and layout.
        hidden_size: channels of a head, D.
        eps: added to the mean square.
        heads: of all ranks.

    Attributes:
        tp_group: ranks that share the heads; set once the model is built.

    Source: OLMo et al., 2 OLMo 2 Furious (arXiv 2501.00656), QK-norm; transformers, models/olmo2/modeling_olmo2.py.
    """

    tp_group: torch.distributed.ProcessGroup

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, *, heads: int) -> None:
        super().__init__()
        self.eps, self.channels = eps, heads * hidden_size
        local = self.channels // config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(local, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., heads/TP, D] → the same. Collective (`tp_group`)."""
        wide = x.float()
        squares = reduce_from_tensor_model_parallel_region(wide.square().sum((-2, -1)), group=self.tp_group)
        squares = copy_to_tensor_model_parallel_region(squares, group=self.tp_group)[..., None, None]
        normed = wide * torch.rsqrt(squares / self.channels + self.eps)
        return (normed * self.weight.view(x.shape[-2:])).to(x.dtype)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The weight, cut as the heads are."""
        own, groups = {"weight": self.weight}, {"tp_group": self.tp_group, "dp_cp_group": metadata["dp_cp_group"]}
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own, prefix, {"weight": 0}, sharded_offsets, **groups
        )
        return state
