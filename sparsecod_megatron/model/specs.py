"""Layer specs: which module stands at each place of a Megatron-Core transformer layer.

Backend (one provider each) × norm placement × dense or mixture of experts; parallel linear layers, MoE and the layer
itself are Megatron-Core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from sparsecod_megatron.backend.stand_ins import WholeLinear
from sparsecod_megatron.config import DataConfig, ModelConfig, ParallelConfig, RunConfig
from sparsecod_megatron.config.flops import is_windowed
from sparsecod_megatron.config.parameters import NORM_RENAMES
from sparsecod_megatron.model.attention import ContextParallelSDPAttention, DocumentSDPAttention, SDPAttention
from sparsecod_megatron.model.latent_attention import latent_attention
from sparsecod_megatron.model.layer import OwnOutput, VariedAttention, VariedLayer
from sparsecod_megatron.model.norms import NORMS, ProjectionRMSNorm
from sparsecod_megatron.model.placement import Placement, final_norm, placement_on_path, placements
from sparsecod_megatron.model.rotary import KindRotatedAttention, changes_by_kind
from sparsecod_megatron.model.router import StepRouter
from sparsecod_megatron.seams.mechanism import LayerSite, Mechanism, configured, mixed
from sparsecod_megatron.seams.residual import residual_path


class ReferenceSpecProvider(LocalSpecProvider):
    """Megatron's local modules with our norm and core attention: plain PyTorch, any device."""

    def __init__(self, attention: type[SDPAttention]) -> None:
        self.attention = attention

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """The norm of every place."""
        return NORMS["RMSNorm" if rms_norm else "LayerNorm"]

    def core_attention(self) -> type:
        """The attention that fits the run's sequences."""
        return self.attention

    def linear(self) -> type:
        """One that every tensor-parallel rank holds whole."""
        return WholeLinear


def spec_provider(data: DataConfig, parallel: ParallelConfig, *, transformer_engine: bool) -> BackendSpecProvider:
    """Transformer Engine's modules, or the reference ones with the core attention that the run needs."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    if data.reset_attention_mask:
        return ReferenceSpecProvider(DocumentSDPAttention)
    sharded = parallel.context_parallel_size > 1
    return ReferenceSpecProvider(ContextParallelSDPAttention if sharded else SDPAttention)


def block_spec(
    config: RunConfig,
    megatron: TransformerConfig,
    provider: BackendSpecProvider,
    *,
    vp_stage: int | None,
    pp_rank: int,
) -> TransformerBlockSubmodules:
    """Specs of the layers that one pipeline (or virtual) stage holds, and of the final norm.

    Args:
        config: ours.
        megatron: `transformer_config` of it.
        provider: the backend's modules.
        vp_stage: index of this model chunk under the interleaved schedule.
        pp_rank: pipeline stage.
    """
    first = get_transformer_layer_offset(megatron, vp_stage, pp_rank)
    count = get_num_layers_to_build(megatron, vp_stage=vp_stage, pp_rank=pp_rank)
    mechanisms = configured(config)
    layers = [
        layer_spec(LayerSite(config.model, megatron, provider, layer), mechanisms)
        for layer in range(first, first + count)
    ]
    path = residual_path(mechanisms, config.model)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=final_norm(config.model, provider, path))


def layer_spec(site: LayerSite, mechanisms: Sequence[Mechanism] = ()) -> ModuleSpec:
    """A layer: its norms, attention and MLP, then what each mechanism makes of them.

    Checkpoints name every input norm as Transformer Engine's fused linear layers do, whether it is fused or not, so
    that they load on either backend. Before a mixture of experts, and before latents, the norm is a module of its own
    there too, and keeps its name (Megatron's local spec renames it, gpt_layer_specs.py:410).
    """
    model, provider, layer = site.model, site.provider, site.layer
    attention, mlp = _placements(site, mechanisms)
    is_moe = model.is_moe_layer(layer)
    fused = provider.fuse_layernorm_and_linear()
    unfused = {branch for mechanism in mechanisms for branch in mechanism.unfused}
    is_latent = model.multi_latent_attention
    fuse_attention = fused and attention.fusible and "attention" not in unfused and not is_latent
    fuse_mlp = fused and mlp.fusible and "mlp" not in unfused and not is_moe
    apart = {"input_layernorm": is_latent, "pre_mlp_layernorm": is_moe}
    renamed = {own: name for name, own in NORM_RENAMES.items() if not apart[own.partition(".")[0]]}
    submodules = TransformerLayerSubmodules(
        input_layernorm=attention.before_fused if fuse_attention else attention.input_norm,
        self_attention=latent_attention(model, provider) if is_latent else _attention(site, fuse=fuse_attention),
        self_attn_bda=attention.join,
        pre_mlp_layernorm=mlp.before_fused if fuse_mlp else mlp.input_norm,
        mlp=_experts(model, site.megatron, provider) if is_moe else _mlp(provider, fuse=fuse_mlp),
        mlp_bda=mlp.join,
        sharded_state_dict_keys_map=renamed if _has_own_input_norm(attention) else {},
    )
    changes = _changes(model, layer)
    spec = ModuleSpec(module=TransformerLayer, submodules=submodules)
    if changes:
        spec = ModuleSpec(module=VariedLayer, submodules=submodules, params={"changes": changes})
    for mechanism in mechanisms:
        spec = mechanism.layer_spec(spec, site)
    return spec


def _placements(site: LayerSite, mechanisms: Sequence[Mechanism]) -> tuple[Placement, Placement]:
    """Around attention, and around the MLP."""
    attention, mlp = placements(site.model, site.megatron, site.provider, site.layer)
    path = residual_path(mechanisms, site.model)
    if path is None:
        return attention, mlp
    first = 2 * site.layer
    return (
        placement_on_path(site.model, attention, path, site.megatron, first),
        placement_on_path(site.model, mlp, path, site.megatron, first + 1),
    )


def _has_own_input_norm(norms: Placement) -> bool:
    return norms.input_norm is not IdentityOp


def _attention(site: LayerSite, *, fuse: bool) -> ModuleSpec:
    model, provider = site.model, site.provider
    query_norm = key_norm = provider.layer_norm(rms_norm=True, for_qk=True) if model.qk_norm else IdentityOp
    if model.norms_projections:
        query_norm, key_norm = (
            ModuleSpec(ProjectionRMSNorm, params={"heads": heads})
            for heads in (model.num_attention_heads, model.query_groups)
        )
    places: dict[str, Any] = {
        "linear_qkv": provider.column_parallel_layer_norm_linear() if fuse else provider.column_parallel_linear(),
        "core_attention": provider.core_attention(),
        "linear_proj": provider.row_parallel_linear(),
        "q_layernorm": query_norm,
        "k_layernorm": key_norm,
    }
    params: dict[str, Any] = {"attn_mask_type": AttnMaskType.causal}
    module: type = SelfAttention
    changes: dict[str, Any] = {}
    if model.attention_output_bias != model.mlp_bias:  # Megatron-Core has one field for both
        module, changes = VariedAttention, {"add_bias_linear": model.attention_output_bias}
    if model.rotary_base_local is not None:
        module, params["is_local"] = KindRotatedAttention, is_windowed(model, site.layer)
        changes = changes | changes_by_kind(model, site.layer)
    if module is not SelfAttention:
        params["changes"] = changes
    return ModuleSpec(module=module, params=params, submodules=SelfAttentionSubmodules(**places))


def _mlp(provider: BackendSpecProvider, *, fuse: bool) -> ModuleSpec:
    linear_fc1 = provider.column_parallel_layer_norm_linear() if fuse else provider.column_parallel_linear()
    return ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(
            linear_fc1=linear_fc1,
            linear_fc2=provider.row_parallel_linear(),
            activation_func=provider.activation_func(),
        ),
    )


def _experts(model: ModelConfig, megatron: TransformerConfig, provider: BackendSpecProvider) -> ModuleSpec:
    spec = get_moe_module_spec_for_backend(
        provider, num_experts=model.num_moe_experts, moe_grouped_gemm=megatron.moe_grouped_gemm
    )
    spec.submodules.router = StepRouter
    if model.mlp_bias and not megatron.moe_grouped_gemm:
        projections = spec.submodules.experts.submodules
        projections.linear_fc2 = mixed(OwnOutput, projections.linear_fc2)
    return spec


def _changes(model: ModelConfig, layer: int) -> dict[str, Any]:
    """TransformerConfig fields whose values differ in this layer."""
    if not model.is_moe_layer(layer) or model.topk(layer) == model.moe_router_topk:
        return {}
    return {"moe_router_topk": model.topk(layer)}
