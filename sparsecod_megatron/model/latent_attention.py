"""Multi-latent attention: Megatron-Core's, with our keys, in places that are the same on either backend.

With c = N(D x) a latent of a token, N an RMSNorm, of queries and of keys and values each:

    q_h = [U_h c_q ; rotated U'_h c_q]     k_h = [K_h c_kv ; rotated R x, which all heads share]     v_h = V_h c_kv

Down-projections and norms are whole on each tensor-parallel rank, which sees its own tokens of a sharded sequence; the
up-projections are split by heads. No norm is fused into a projection, so that tensors have one name on both backends.

Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1; Megatron-Core 0.16.1 transformer/multi_latent_attention.py.
"""

from __future__ import annotations

from typing import Any

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.embeddings import YarnRotaryEmbedding
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.model.layer import Varied
from sparsecod_megatron.model.rotary import scale_as_llama3

LATENT_EPSILON = 1e-6
"""The ε in norms of latents, whatever `model.layernorm_epsilon` says.

Source: transformers, models/deepseek_v3/modeling_deepseek_v3.py, whose norms of latents take that default.
"""


class LatentAttention(Varied, MLASelfAttention):
    """Megatron's, with every scaling of rotation that ordinary attention has.

    Args:
        *arguments: of `MLASelfAttention`, and `changes` of `Varied`.
        model: ours.
        **options: the others.
    """

    def __init__(self, *arguments: Any, model: ModelConfig, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if isinstance(self.rotary_pos_emb, YarnRotaryEmbedding):
            self.rotary_pos_emb.correction_range_round_to_int = model.yarn_correction_range_round_to_int
        elif model.rope_scaling == "linear":
            self.rotary_pos_emb.seq_len_interpolation_factor = model.rope_scaling_factor
        elif model.rope_scaling == "llama3":
            scale_as_llama3(self.rotary_pos_emb, model)


def latent_attention(model: ModelConfig, provider: BackendSpecProvider) -> ModuleSpec:
    """The spec of it. Local.

    Args:
        model: ours.
        provider: the backend's modules.
    """
    norm, down, up = provider.layer_norm(rms_norm=True), provider.linear(), provider.column_parallel_linear()
    has_latent = model.q_lora_rank is not None
    return ModuleSpec(
        module=LatentAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "model": model,
            # Megatron-Core has one field for biases of attention and of MLPs.
            "changes": {"layernorm_epsilon": LATENT_EPSILON, "add_bias_linear": model.attention_output_bias},
        },
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=up,
            linear_q_down_proj=down,
            linear_q_up_proj=up,
            linear_kv_down_proj=down,
            linear_kv_up_proj=up,
            core_attention=provider.core_attention(),
            linear_proj=provider.row_parallel_linear(),
            q_layernorm=norm if has_latent else IdentityOp,
            kv_layernorm=norm,
        ),
    )


def latent_fields(model: ModelConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's configuration that say what it is; none is left at a default of upstream's."""
    scaled = model.rope_scaling == "yarn"
    return {
        "multi_latent_attention": True,
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "rope_type": "yarn" if scaled else "rope",
        "rotary_base": model.rotary_base,
        "rotary_percent": 1.0,
        # Scores are multiplied by a power of its logarithm whatever the type says.
        "rotary_scaling_factor": model.rope_scaling_factor if scaled else 1.0,
        "original_max_position_embeddings": model.rope_original_max_position_embeddings,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": model.mscale,
        "mscale_all_dim": model.mscale_all_dim,
        "cache_mla_latents": False,
    }
