"""Configurations of DeepSeek-V2 and V3: tiny ones that are read, and those that are refused, by the message."""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV2Config, DeepseekV3Config, PreTrainedConfig

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
}
V3: dict[str, Any] = SIZES | EXPERTS | {"n_group": 2, "topk_group": 1, "num_mtp_layers": 0}
V2: dict[str, Any] = SIZES | EXPERTS
GROUPS = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
CONFIGS: dict[str, PreTrainedConfig] = {
    "deepseek-v3": DeepseekV3Config(**V3),
    "deepseek-v3-yarn": DeepseekV3Config(**V3 | {"q_lora_rank": None}, rms_norm_eps=1e-3, rope_parameters=YARN),
    "deepseek-v3-dense": DeepseekV3Config(
        **V3 | {"first_k_dense_replace": 4}, tie_word_embeddings=True, rope_parameters=LINEAR
    ),
    "deepseek-v2": DeepseekV2Config(**V2, rope_parameters=YARN),
    "deepseek-v2-one-group": DeepseekV2Config(**V2, **GROUPS | {"n_group": 1}),
    "deepseek-v2-groups": DeepseekV2Config(**V2 | {"q_lora_rank": None, "num_experts_per_tok": 1}, **GROUPS),
}
REFUSED: dict[str, PreTrainedConfig] = {
    "num_nextn_predict_layers 1 has no counterpart": DeepseekV3Config(**V3 | {"num_mtp_layers": 1}),
    "rope_interleave False has no counterpart": DeepseekV3Config(**V3, rope_interleave=False),
    "norm_topk_prob False has no counterpart": DeepseekV3Config(**V3, norm_topk_prob=False),
    "quantization_config is 'fp8'": DeepseekV3Config(**V3, quantization_config={"quant_method": "fp8"}),
    "topk_group 2: .* by 2 experts": DeepseekV3Config(**V3 | {"topk_group": 2}),
    "num_experts_per_tok 1: the class divides": DeepseekV3Config(**V3 | {"num_experts_per_tok": 1}),
    "attention_bias True has no counterpart": DeepseekV2Config(**V2, attention_bias=True),
    "mlp_bias True has no counterpart": DeepseekV2Config(**V2, mlp_bias=True),
    "norm_topk_prob True has no counterpart": DeepseekV2Config(**V2, norm_topk_prob=True),
    "topk_group 1: .* by 1 expert": DeepseekV2Config(**V2, **GROUPS),
    "rope_parameters .* has no counterpart": DeepseekV2Config(
        **V2, rope_parameters={name: value for name, value in YARN.items() if name != "mscale"}
    ),
}
"""Pattern of the message → configuration."""
