"""Where the norms of a layer stand, in terms of the two places that a Megatron-Core layer has for them.

With N a norm, f a branch (attention or MLP) and s = 1 / sqrt(layer + 1) under LayerNorm scaling (1 otherwise):

    pre              x + f(s · N(x))
    parallel         x + attention(s · N(x)) + mlp(s · N'(x)) in one layer
    post             N(x + f(x))
    peri, sandwich   x + s · N'(f(N(x)))      peri also normalises the embeddings
    branch           x + s · N(f(x))
    mix              post in the first layers, pre in the others

With a residual path of a mechanism, x + y is its join, and what N is of is its read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.model.norms import NORMS
from sparsecod_megatron.model.residual import (
    BranchJoin,
    BranchNorm,
    LayerInput,
    ParallelEnd,
    ParallelStart,
    PostNorm,
    ScaledJoin,
)
from sparsecod_megatron.model.streams import BareRead, read_of
from sparsecod_megatron.seams.residual import ResidualPath


@dataclass(frozen=True)
class Placement:
    """The norms around a branch.

    Attributes:
        input_norm: before the branch.
        join: how the branch is added to the residual stream.
        fusible: whether a kernel that fuses a plain norm into the next linear layer computes the same.
        before_fused: stands in place of the norm where it is fused.
    """

    input_norm: ModuleSpec | type
    join: ModuleSpec | Callable[..., Any]
    fusible: bool
    before_fused: type = IdentityOp


def placements(
    model: ModelConfig, megatron: TransformerConfig, provider: BackendSpecProvider, layer: int
) -> tuple[Placement, Placement]:
    """Around attention, and around the MLP, of layer `layer` (from 0).

    Source: Wang and Komatsuzaki, GPT-J-6B (2021) for `parallel`, with GPT-NeoX's two norms (arXiv 2204.06745);
    `_placement` for the others.
    """
    plain = _placement(model, megatron, provider, layer)
    if not model.is_parallel:
        return plain, plain
    start, end = (ModuleSpec(join, params={"config": megatron}) for join in (ParallelStart, ParallelEnd))
    reading = own_norm(model, {"scale": model.scale(layer), "read": LayerInput})
    return replace(plain, join=start), replace(plain, input_norm=reading, join=end, before_fused=LayerInput)


def stream_norm(model: ModelConfig, provider: BackendSpecProvider) -> type:
    """The backend's norm of `model.normalization`."""
    norm: type = provider.layer_norm(rms_norm=model.normalization == "RMSNorm")
    return norm


def own_norm(model: ModelConfig, params: dict[str, Any]) -> ModuleSpec:
    """PyTorch's of that kind, of which no backend has a fused kernel."""
    return ModuleSpec(NORMS[model.normalization], params=params)


def _placement(model: ModelConfig, megatron: TransformerConfig, provider: BackendSpecProvider, layer: int) -> Placement:
    """The same around both branches.

    Source: Mix-LN (arXiv 2412.13795) for `mix`, LayerNorm scaling (arXiv 2502.05795), `residual.py` for the others.
    """
    norm = stream_norm(model, provider)
    scaled = own_norm(model, {"scale": model.scale(layer)}) if model.layernorm_scaling else norm

    def joined_by(join: type, norm: ModuleSpec | type) -> ModuleSpec:
        return ModuleSpec(join, params={"config": megatron, "norm": norm})

    if model.is_post_norm(layer):
        return Placement(IdentityOp, joined_by(PostNorm, norm), fusible=False)
    if model.has_branch_norm:
        before = norm if model.has_input_norm(layer) else IdentityOp
        return Placement(before, joined_by(BranchNorm, scaled), fusible=before is not IdentityOp)
    join: ModuleSpec | Callable[..., Any] = get_bias_dropout_add
    if model.residual_multiplier != 1:
        join = ModuleSpec(ScaledJoin, params={"config": megatron, "factor": model.residual_multiplier})
    return Placement(scaled, join, fusible=not model.layernorm_scaling)


def placement_on_path(
    model: ModelConfig, plain: Placement, path: ResidualPath, megatron: TransformerConfig, sublayer: int
) -> Placement:
    """One of what `placements` gives, with the reads and joins of a residual path.

    Args:
        model: ours.
        plain: without the path.
        path: of a mechanism.
        megatron: Megatron-Core's configuration.
        sublayer: attention of layer l is 2l, its MLP 2l + 1.
    """
    where = {"path": path, "sublayer": sublayer}
    join = ModuleSpec(BranchJoin, params={"config": megatron, **where})
    if isinstance(plain.join, ModuleSpec):
        join = ModuleSpec(plain.join.module, params={**plain.join.params, **where})
    if not _has_reads(path):
        return replace(plain, join=join)
    own = plain.input_norm.params if isinstance(plain.input_norm, ModuleSpec) else {}
    return Placement(own_norm(model, {"read": read_of(path, sublayer), **own}), join, fusible=False)


def final_norm(
    model: ModelConfig, provider: BackendSpecProvider, path: ResidualPath | None
) -> ModuleSpec | type | None:
    """What stands behind the layers; None: nothing. The output layer being linear, its scale is that of the logits."""
    scale = {} if model.logits_scaling == 1 else {"scale": 1 / model.logits_scaling}
    if path is None or not _has_reads(path):
        norm = own_norm(model, scale) if scale else stream_norm(model, provider)
        return norm if model.final_norm else None
    last = 2 * model.num_layers
    if not model.final_norm:
        return ModuleSpec(BareRead, params={"path": path, "sublayer": last})
    return own_norm(model, {"read": read_of(path, last), **scale})


def _has_reads(path: ResidualPath) -> bool:
    """Whether a norm gets something else than the state."""
    return path.columns > 1 or path.state_in_fp32
