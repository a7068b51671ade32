"""Models that cannot be, or would not be what their keys say, are refused in one line with the fix."""

from __future__ import annotations

import pytest

from sparsecod_megatron.config import load_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from tests.helpers.megatron import SMALL
from tests.helpers.variants import DENSE, LATENTS, MOE, MOE_SHAPE

LNS = "model.layernorm_scaling=true"
DOCUMENTS = ("data.reset_attention_mask=true", "data.reset_position_ids=true")
SINKS = "model.softmax_type=learnable"
SIGMOID = "model.moe_router_score_function=sigmoid"
GROUPS = ("model.moe_router_num_groups=4", "model.moe_router_group_topk=2")


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((*LATENTS, "model.qk_norm=true"), ["model.qk_norm: true", "normalised already", "set it to false"]),
        ((*LATENTS, "model.sliding_window=4"), ["model.sliding_window: 4", "has no window", "set it to null"]),
        ((*LATENTS, "model.softmax_scale=0.5"), ["model.softmax_scale: 0.5", "mscale_all_dim"]),
        ((*LATENTS, "model.normalization=LayerNorm"), ["model.normalization: LayerNorm", "RMSNorm alone"]),
        ((*LATENTS, "model.num_query_groups=2"), ["model.num_query_groups: 2", "keys of its own; use 4"]),
        ((*LATENTS, "model.kv_channels=8"), ["model.kv_channels: 8", "remove it"]),
        ((*LATENTS, "model.qk_pos_emb_head_dim=5"), ["model.qk_pos_emb_head_dim: 5 is odd"]),
        ((*LATENTS, "parallel.tensor_model_parallel_size=2"), ["parallel.sequence_parallel: false", "over 2 ranks"]),
        ((*LATENTS, "megatron.rotary_interleaved=true"), ["megatron.rotary_interleaved: true", "neighbouring pairs"]),
        ((*LATENTS, "mechanisms.headwise_gate={}"), ["multi_latent_attention: true", "mechanisms.headwise_gate gates"]),
        ((*LATENTS, "mechanisms.value_residual={}"), ["multi_latent_attention: true", "mechanisms.value_residual"]),
        ((*LATENTS, "mechanisms.s2_attention.stride=2"), ["multi_latent_attention: true", "mechanisms.s2_attention"]),
        ((*LATENTS, "mechanisms.ste={}"), ["mechanisms.ste has `qkv`", "set mechanisms.ste.kinds=[attention_output, "]),
        ((*LATENTS, "mechanisms.monarch={}"), ["mechanisms.monarch has `qkv`", "mechanisms.monarch.kinds=[attention"]),
        (
            (*LATENTS, "mechanisms.random_groups.pattern=head"),
            ["mechanisms.random_groups has heads", "mechanisms.random_groups.pattern=neuron"],
        ),
        (
            (LNS, "model.norm_placement=post"),
            ["model.layernorm_scaling: true", "use it with pre, parallel, peri"],
        ),
        ((LNS, "model.norm_placement=mix"), ["model.layernorm_scaling: true", "norm_placement=mix"]),
        (("model.final_norm=false",), ["model.final_norm: false", "norm_placement=pre"]),
        (("model.norm_placement=before",), ["model.norm_placement: 'before'", "sandwich"]),
        (("model.window_attn_skip_freq=2",), ["model.window_attn_skip_freq: 2", "sliding_window"]),
        (("model.no_rope_freq=[0,1]",), ["model.no_rope_freq: 2 entries", "num_layers=3"]),
        (("model.no_rope_freq=[0,1,2]",), ["model.no_rope_freq: [0, 1, 2]", "0 and 1"]),
        (("model.residual_multiplier=0.5", "model.norm_placement=peri"), ["residual_multiplier: 0.5", "use pre"]),
        (
            ("model.residual_multiplier=0.5", "model.norm_placement=parallel"),
            ["residual_multiplier: 0.5", "as they are"],
        ),
        (
            ("model.normalization=LayerNorm", "model.layernorm_zero_centered_gamma=true"),
            ["layernorm_zero_centered_gamma: true", "by its weight alone"],
        ),
        (
            ("model.normalization=LayerNorm", "model.qk_norm=true"),
            ["normalization: LayerNorm", "set RMSNorm, or qk_norm"],
        ),
        (
            ("model.logits_scaling=2", "model.norm_placement=post", "model.final_norm=false"),
            ["model.logits_scaling: 2", "final norm"],
        ),
        (("model.rotary_base_local=100",), ["model.rotary_base_local: 100", "sliding_window"]),
        (
            ("model.layernorm_zero_centered_gamma=true", "model.qk_norm=true", "model.qk_norm_scope=projection"),
            ["model.layernorm_zero_centered_gamma: true", "use head"],
        ),
        (("model.qk_norm_scope=projection",), ["model.qk_norm_scope: projection", "qk_norm is false"]),
        (
            (
                *("model.qk_norm=true", "model.qk_norm_scope=projection", "model.num_query_groups=1"),
                "parallel.tensor_model_parallel_size=2",
            ),
            ["model.qk_norm_scope: projection", "2 tensor-parallel ranks share 1 key heads"],
        ),
        (("model.attention_output_bias=true",), ["model.attention_output_bias: true", "qkv_bias is false"]),
        (
            (*MOE_SHAPE, "model.mlp_bias=true", "model.moe_shared_expert_intermediate_size=24"),
            ["model.mlp_bias: true", "shared expert has none"],
        ),
        ((*DOCUMENTS, SINKS), ["data.reset_attention_mask: true", "model.softmax_type"]),
        (DOCUMENTS[:1], ["data.reset_position_ids: false", "both or neither"]),
        (
            (*DOCUMENTS, "parallel.context_parallel_size=2"),
            ["data.reset_attention_mask: true", "context_parallel_size"],
        ),
        (
            (*DOCUMENTS, *MOE_SHAPE, "model.moe_router_load_balancing_type=seq_aux_loss"),
            ["moe_router_load_balancing_type: seq_aux_loss", "aux_loss"],
        ),
        (("model.mup_base_hidden_size=16", "model.init=mitchell"), ["mup_base_hidden_size", "init=mitchell"]),
        (
            ("model.mup_base_hidden_size=16", "model.untie_embeddings_and_output_weights=false"),
            ["mup_base_hidden_size", "untie_embeddings_and_output_weights=true"],
        ),
        ((*MOE_SHAPE, "model.moe_first_k_dense_layers=3"), ["moe_first_k_dense_layers: 3", "lower it"]),
        ((*MOE_SHAPE, "model.moe_router_topk_per_layer=[1,2]"), ["topk_per_layer: 2 entries", "num_layers=3"]),
        ((*MOE_SHAPE, "model.moe_router_topk_per_layer=[2,2,9]"), ["topk_per_layer[2]: 9", "num_moe_experts=8"]),
        ((*MOE_SHAPE, "model.moe_router_topk_per_layer=[2,0,2]"), ["topk_per_layer[1]: 0", "raise it"]),
        ((*MOE_SHAPE, "model.moe_router_topk_per_layer=[2,1,2]"), ["topk_per_layer[1]: 1", "pre_softmax=true"]),
        ((*MOE_SHAPE, GROUPS[0]), ["moe_router_group_topk: None", "both or neither"]),
        ((*MOE_SHAPE, *GROUPS, "model.moe_router_num_groups=3"), ["num_moe_experts: 8", "moe_router_num_groups=3"]),
        ((*MOE_SHAPE, *GROUPS, "model.moe_router_group_topk=5"), ["moe_router_group_topk: 5", "lower it"]),
        ((*MOE_SHAPE, *GROUPS, "model.moe_router_topk=5"), ["moe_router_topk: 5", "group_topk"]),
        (
            (*MOE_SHAPE, *GROUPS, "model.moe_router_topk=1", "model.moe_router_pre_softmax=true"),
            ["moe_router_group_topk: 2", "lower it"],
        ),
        ((*MOE_SHAPE, "model.moe_router_enable_expert_bias=true"), ["enable_expert_bias", "=sigmoid"]),
        (
            (*MOE_SHAPE, SIGMOID, "model.moe_router_pre_softmax=true"),
            ["moe_router_pre_softmax: true", "set it to false"],
        ),
        (
            (*MOE_SHAPE, "model.moe_shared_expert_gate=true"),
            ["moe_shared_expert_gate", "shared_expert_intermediate_size"],
        ),
    ],
)
def test_refused(overrides: tuple[str, ...], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overrides", [*DENSE.values(), *((*MOE_SHAPE, *variant) for variant in MOE.values())])
def test_every_variant_is_accepted(overrides: tuple[str, ...]) -> None:
    load_config(None, [*SMALL, *overrides])
