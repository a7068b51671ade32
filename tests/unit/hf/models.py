"""Small models of every kind that converts, by a name that says what is special about them."""

from __future__ import annotations

from sparsecod_megatron.config import ModelConfig


def tiny(**changes: object) -> ModelConfig:
    values: dict[str, object] = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 40,
        "num_attention_heads": 4,
        "vocab_size": 61,
        "rotary_base": 500,
    }
    return ModelConfig(**(values | changes))  # type: ignore[arg-type]


def moe(**changes: object) -> ModelConfig:
    return tiny(**({"num_moe_experts": 5, "moe_router_topk": 2, "moe_ffn_hidden_size": 24} | changes))


LING: dict[str, object] = {
    "num_moe_experts": 8,
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_first_k_dense_layers": 1,
    "moe_shared_expert_intermediate_size": 48,
    "qk_norm": True,
    "rotary_percent": 0.5,
}
LATENTS: dict[str, object] = {
    "multi_latent_attention": True,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
}
NEOX: dict[str, object] = {
    "normalization": "LayerNorm",
    "norm_placement": "parallel",
    "activation": "gelu",
    "rotary_percent": 0.25,
    "qkv_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
}
MODELS = {
    "mha": tiny(),
    "gqa": tiny(num_query_groups=2),
    "mqa": tiny(num_query_groups=1),
    "tied": tiny(num_query_groups=2, untie_embeddings_and_output_weights=False),
    "wide heads": tiny(num_query_groups=2, kv_channels=14),
    "heads that do not divide": tiny(hidden_size=20, num_attention_heads=6, num_query_groups=3, kv_channels=6),
    "biases": tiny(num_query_groups=2, qkv_bias=True, attention_output_bias=True, mlp_bias=True),
    "qkv biases": tiny(num_query_groups=2, qkv_bias=True),
    "no rotation in a layer": tiny(num_query_groups=2, no_rope_freq=[1, 0]),
    "half of the channels rotate": tiny(num_query_groups=2, rotary_percent=0.5),
    "multipliers": tiny(
        embedding_multiplier=3.0, residual_multiplier=0.3, softmax_scale=0.2, logits_scaling=4.0, mlp_bias=True
    ),
    "neox": tiny(**NEOX),
    "moe": moe(num_query_groups=2),
    "moe wide heads": moe(kv_channels=14),
    "moe tied": moe(untie_embeddings_and_output_weights=False),
    "moe top-1": moe(moe_router_topk=1, moe_router_pre_softmax=True),
    "moe shared": moe(moe_shared_expert_intermediate_size=28),
    "moe biases": moe(moe_shared_expert_intermediate_size=28, qkv_bias=True),
    "moe pre-softmax": moe(moe_router_pre_softmax=True, num_query_groups=1),
    "moe pre-softmax wide heads": moe(moe_router_pre_softmax=True, kv_channels=14),
    "moe pre-softmax shared": moe(moe_router_pre_softmax=True, moe_shared_expert_intermediate_size=28),
    "moe ling": moe(**LING),
    "latents": tiny(**LATENTS, untie_embeddings_and_output_weights=False),
    "moe latents": moe(
        **LATENTS | LING | {"qk_norm": False, "rotary_percent": 1.0, "q_lora_rank": None},
        rope_scaling="yarn",
        mscale_all_dim=1.0,
    ),
    "moe latents pre-softmax": moe(**LATENTS, moe_router_pre_softmax=True, moe_shared_expert_intermediate_size=48),
}
