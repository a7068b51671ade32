"""Layer specs: which module stands at each place of a Megatron-Core transformer layer.

One provider per backend; everything else (layers, MoE, parallel linear layers) is Megatron-Core's.
"""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from sparsecod_megatron.model.attention import ContextParallelSDPAttention, SDPAttention
from sparsecod_megatron.model.norms import RMSNorm


class ReferenceSpecProvider(LocalSpecProvider):
    """Megatron's local modules with our norm and core attention: plain PyTorch, any device."""

    def __init__(self, context_parallel: bool) -> None:
        self.context_parallel = context_parallel

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """The norm of every place."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention of one sequence shard."""
        return ContextParallelSDPAttention if self.context_parallel else SDPAttention


def block_spec(
    config: TransformerConfig, *, transformer_engine: bool, vp_stage: int | None, pp_rank: int
) -> TransformerBlockSubmodules:
    """Specs of the layers that one pipeline (or virtual) stage holds, and of the final norm.

    Args:
        config: the whole model's.
        transformer_engine: Transformer Engine's modules, or the reference ones.
        vp_stage: index of this model chunk under the interleaved schedule.
        pp_rank: pipeline stage.
    """
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm

        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm
        )
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    layer = reference_layer_spec(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)


def reference_layer_spec(config: TransformerConfig) -> ModuleSpec:
    """A pre-norm layer of reference modules, dense or mixture of experts.

    Checkpoints name the norms as Transformer Engine's fused linear layers do, so that they load on either backend.
    Before a mixture of experts the norm is a module of its own there too, and keeps its name (Megatron's local spec
    renames it, gpt_layer_specs.py:410).
    """
    provider = ReferenceSpecProvider(context_parallel=config.context_parallel_size > 1)
    renamed = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if config.num_moe_experts is None:
        renamed["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=provider.column_parallel_linear(),
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=IdentityOp,
            k_layernorm=IdentityOp,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=provider.layer_norm(),
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=provider.layer_norm(),
            mlp=get_mlp_module_spec_for_backend(backend=provider, num_experts=config.num_moe_experts),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=renamed,
        ),
    )
