"""Where the norms of a layer stand, in terms of the two places that a Megatron-Core layer has for them.

With N a norm, f a branch (attention or MLP) and s = 1 / sqrt(layer + 1) under LayerNorm scaling (1 otherwise):

    pre              x + f(s · N(x))
    post             N(x + f(x))
    peri, sandwich   x + s · N'(f(N(x)))      peri also normalises the embeddings
    mix              post in the first layers, pre in the others
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.model.norms import ScaledRMSNorm
from sparsecod_megatron.model.residual import BranchNorm, PostNorm


@dataclass(frozen=True)
class Placement:
    """The norms of one layer, the same around attention and MLP.

    Attributes:
        input_norm: before the branch.
        join: how the branch is added to the residual stream.
        fusible: whether a kernel that fuses a plain norm into the next linear layer computes the same.
    """

    input_norm: ModuleSpec | type
    join: ModuleSpec | Callable[..., Any]
    fusible: bool


def placement(model: ModelConfig, megatron: TransformerConfig, provider: BackendSpecProvider, layer: int) -> Placement:
    """The norms of layer `layer` (from 0).

    Source: Mix-LN (arXiv 2412.13795) for `mix`, LayerNorm scaling (arXiv 2502.05795), `residual.py` for the others.
    """
    norm = provider.layer_norm(rms_norm=True)
    scaled = ModuleSpec(ScaledRMSNorm, params={"scale": model.scale(layer)}) if model.layernorm_scaling else norm

    def joined_by(join: type, norm: ModuleSpec | type) -> ModuleSpec:
        return ModuleSpec(join, params={"config": megatron, "norm": norm})

    if model.is_post_norm(layer):
        return Placement(IdentityOp, joined_by(PostNorm, norm), fusible=False)
    if model.norm_placement in ("peri", "sandwich"):
        return Placement(norm, joined_by(BranchNorm, scaled), fusible=True)
    return Placement(scaled, get_bias_dropout_add, fusible=not model.layernorm_scaling)
