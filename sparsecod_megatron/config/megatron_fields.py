"""Every field of Megatron-Core's configuration classes, and what happens to it under `megatron:`.

A field that nothing here reads would train another model than its name says, so each is in one list: it passes, a key
of ours sets it, or it is refused with the reason (`megatron_refused.py`). What is in no list is refused. Plain data,
because planning answers as training does and imports neither torch nor Megatron-Core.

Source: Megatron-Core 0.16.1 model_parallel_config.py, transformer_config.py (MLATransformerConfig too),
optimizer_config.py, distributed_data_parallel_config.py.
"""

from __future__ import annotations

from typing import Any

Kind = type | tuple[str, ...]
"""bool, int, float, str, list (entries of one or several of these), or the strings to choose among."""

FUNCTION_FIELDS: dict[str, Kind] = {
    "glu_linear_offset": float,
    "rotary_interleaved": bool,
}
"""Fields that change the function that is computed, and are read by the modules of either backend."""

STAGE_FIELDS: dict[str, Kind] = {
    "account_for_embedding_in_pipeline_split": bool,
    "account_for_loss_in_pipeline_split": bool,
    "num_layers_in_first_pipeline_stage": int,
    "num_layers_in_last_pipeline_stage": int,
    "pipeline_model_parallel_layout": str,
}
"""Layouts whose pipeline stages hold different numbers of layers."""

MOE_FIELDS: dict[str, Kind] = {
    "moe_deepep_num_sms": int,
    "moe_flex_dispatcher_backend": ("deepep", "hybridep"),
    "moe_grouped_gemm": bool,
    "moe_hybridep_num_sms": int,
    "moe_input_jitter_eps": float,
    "moe_pad_expert_input_to_capacity": bool,
    "moe_permute_fusion": bool,
    "moe_router_force_load_balancing": bool,
    "moe_router_fusion": bool,
    "moe_shared_expert_overlap": bool,
    "moe_token_dispatcher_type": ("allgather", "alltoall", "flex"),
    "moe_token_drop_policy": ("probs", "position"),
    "use_fused_weighted_squared_relu": bool,
}
"""Fields that pass where there are experts."""

FP8_FIELDS: dict[str, Kind] = {
    "fp8_dot_product_attention": bool,
    "fp8_margin": int,
    "fp8_multi_head_attention": bool,
    "fp8_wgrad": bool,
    "tp_only_amax_red": bool,
}
"""Fields that pass where `precision.fp8_recipe` is not none."""

MUON_FIELDS: dict[str, Kind] = {"muon_fp32_matmul_prec": ("low", "medium", "high", "highest"), "muon_split_qkv": bool}
ADAM_FIELDS: dict[str, Kind] = {"decoupled_weight_decay": bool}

FIELDS_PASSED: dict[str, Kind] = {
    **FUNCTION_FIELDS,
    **STAGE_FIELDS,
    **MOE_FIELDS,
    **FP8_FIELDS,
    **MUON_FIELDS,
    **ADAM_FIELDS,
    # Memory.
    "cpu_offloading": bool,
    "cpu_offloading_activations": bool,
    "cpu_offloading_double_buffering": bool,
    "cpu_offloading_num_layers": int,
    "cpu_offloading_weights": bool,
    "deallocate_pipeline_outputs": bool,
    "distribute_saved_activations": bool,
    "recompute_granularity": ("selective", "full"),
    "recompute_method": ("uniform", "block"),
    "recompute_modules": list,
    "recompute_num_layers": int,
    # Kernels.
    "activation_func_fp8_input_store": bool,
    "apply_rope_fusion": bool,
    "attention_backend": ("flash", "fused", "unfused", "auto"),
    "bias_activation_fusion": bool,
    "bias_dropout_fusion": bool,
    "clone_scatter_output_in_embedding": bool,
    "cross_entropy_fusion_impl": ("native", "te"),
    "cross_entropy_loss_fusion": bool,
    "deterministic_mode": bool,
    "disable_parameter_transpose_cache": bool,
    "fused_single_qkv_rope": bool,
    "gradient_accumulation_fusion": bool,
    "use_te_activation_func": bool,
    # Communication.
    "align_param_gather": bool,
    "average_in_collective": bool,
    "batch_p2p_comm": bool,
    "batch_p2p_sync": bool,
    "bucket_size": int,
    "cp_comm_type": ("p2p", "all_gather", "a2a"),
    "grad_reduce_in_fp32": bool,
    "microbatch_group_size_per_vp_stage": int,
    "overlap_grad_reduce": bool,
    "overlap_p2p_comm": bool,
    "overlap_p2p_comm_warmup_flush": bool,
    "overlap_param_gather": bool,
    "pad_buckets_for_high_nccl_busbw": bool,
    "reduce_scatter_with_fp32_accumulation": bool,
}
"""Performance, layout and numerics: given to Megatron-Core as they are."""

MODULES_TO_RECOMPUTE = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")
"""Entries of `recompute_modules`."""

_RECOMPUTE_FULL: tuple[str, tuple[Any, ...]] = ("recompute_granularity", ("full",))
_OFFLOADING: tuple[str, tuple[Any, ...]] = ("cpu_offloading", (True,))
_FLEX: tuple[str, tuple[Any, ...]] = ("moe_token_dispatcher_type", ("flex",))
READING_CONDITIONS: dict[str, tuple[str, tuple[Any, ...]]] = {
    "align_param_gather": ("overlap_param_gather", (True, None)),
    "batch_p2p_sync": ("batch_p2p_comm", (True,)),
    "bucket_size": ("overlap_grad_reduce", (True, None)),
    "cpu_offloading_activations": _OFFLOADING,
    "cpu_offloading_double_buffering": _OFFLOADING,
    "cpu_offloading_num_layers": _OFFLOADING,
    "cpu_offloading_weights": _OFFLOADING,
    "cross_entropy_fusion_impl": ("cross_entropy_loss_fusion", (True, None)),
    "distribute_saved_activations": _RECOMPUTE_FULL,
    "fused_single_qkv_rope": ("apply_rope_fusion", (True, None)),
    "moe_deepep_num_sms": _FLEX,
    "moe_flex_dispatcher_backend": _FLEX,
    "moe_hybridep_num_sms": _FLEX,
    "overlap_p2p_comm_warmup_flush": ("overlap_p2p_comm", (True,)),
    "recompute_method": _RECOMPUTE_FULL,
    "recompute_modules": ("recompute_granularity", ("selective",)),
    "recompute_num_layers": _RECOMPUTE_FULL,
}
"""Field → another field of `megatron:`, and the values (None: not set) with which anything reads the first."""

TRANSFORMER_ENGINE_FIELDS = frozenset(
    {
        *FP8_FIELDS,
        "activation_func_fp8_input_store",
        "attention_backend",
        "cp_comm_type",
        "cpu_offloading",
        "cpu_offloading_activations",
        "cpu_offloading_double_buffering",
        "cpu_offloading_num_layers",
        "cpu_offloading_weights",
        "cross_entropy_fusion_impl",
        "disable_parameter_transpose_cache",
        "fused_single_qkv_rope",
        "moe_deepep_num_sms",
        "moe_flex_dispatcher_backend",
        "moe_grouped_gemm",
        "moe_hybridep_num_sms",
        "moe_permute_fusion",
        "moe_router_fusion",
        "use_fused_weighted_squared_relu",
        "use_te_activation_func",
    }
)
"""Fields that nothing reads, or that end in a traceback, without Transformer Engine: on the CPU, and on CUDA without
the package."""

LATENT_CONFLICTS: dict[str, str] = {
    "apply_rope_fusion": "its fused rotation is of yarn alone, whose range of channels it always rounds",
    "fused_single_qkv_rope": "there is no one projection of queries, keys and values",
    "muon_split_qkv": "there is no one projection of queries, keys and values",
    "rotary_interleaved": "its channels rotate by neighbouring pairs already",
}
"""Fields that pass beside ordinary attention alone, and why."""

KEYS_OF_FIELDS: dict[str, str] = {
    **{
        name: f"parallel.{name}"
        for name in (
            "context_parallel_size",
            "expert_model_parallel_size",
            "expert_tensor_parallel_size",
            "pipeline_model_parallel_size",
            "sequence_parallel",
            "tensor_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
        )
    },
    **{
        name: f"model.{name}"
        for name in (
            "activation_func_clamp_value",
            "attention_dropout",
            "attention_output_gate",
            "ffn_hidden_size",
            "hidden_dropout",
            "hidden_size",
            "init_method_std",
            "kv_channels",
            "kv_lora_rank",
            "layernorm_epsilon",
            "layernorm_zero_centered_gamma",
            "moe_aux_loss_coeff",
            "moe_expert_capacity_factor",
            "moe_ffn_hidden_size",
            "moe_router_bias_update_rate",
            "moe_router_dtype",
            "moe_router_enable_expert_bias",
            "moe_router_group_topk",
            "moe_router_load_balancing_type",
            "moe_router_num_groups",
            "moe_router_pre_softmax",
            "moe_router_score_function",
            "moe_router_topk",
            "moe_router_topk_scaling_factor",
            "moe_shared_expert_gate",
            "moe_shared_expert_intermediate_size",
            "moe_z_loss_coeff",
            "mscale",
            "mscale_all_dim",
            "multi_latent_attention",
            "no_rope_freq",
            "normalization",
            "num_attention_heads",
            "num_layers",
            "num_moe_experts",
            "num_query_groups",
            "q_lora_rank",
            "qk_head_dim",
            "qk_pos_emb_head_dim",
            "rotary_base",
            "softmax_scale",
            "softmax_type",
            "v_head_dim",
            "window_attn_skip_freq",
        )
    },
    "activation_func": "model.activation",
    "add_bias_linear": "model.mlp_bias",
    "add_qkv_bias": "model.qkv_bias",
    "embedding_init_method": "model.init",
    "embedding_init_method_std": "model.init_std.embedding",
    "gated_linear_unit": "model.activation",
    "init_method": "model.init",
    "moe_layer_freq": "model.moe_first_k_dense_layers",
    "original_max_position_embeddings": "model.rope_original_max_position_embeddings",
    "output_layer_init_method": "model.init",
    "perform_initialization": "model.init",
    "qk_layernorm": "model.qk_norm",
    "rope_type": "model.rope_scaling",
    "rotary_scaling_factor": "model.rope_scaling_factor",
    "use_cpu_initialization": "model.init",
    "window_size": "model.sliding_window",
    **dict.fromkeys(
        ("autocast_dtype", "bf16", "enable_autocast", "fp16", "params_dtype", "pipeline_dtype"), "precision.dtype"
    ),
    **{
        name: f"precision.{name}"
        for name in (
            "fp8_amax_compute_algo",
            "fp8_amax_history_len",
            "fp8_param_gather",
            "fp8_recipe",
            "num_layers_at_end_in_bf16",
            "num_layers_at_start_in_bf16",
        )
    },
    "first_last_layers_bf16": "precision.num_layers_at_start_in_bf16",
    "fp8": "precision.fp8_recipe",
    "fp8_param": "precision.fp8_param_gather",
    **{
        name: f"optimizer.{name}"
        for name in (
            "adam_beta1",
            "adam_beta2",
            "adam_eps",
            "clip_grad",
            "lr",
            "muon_extra_scale_factor",
            "muon_momentum",
            "muon_num_ns_steps",
            "muon_scale_mode",
            "muon_tp_mode",
            "muon_use_nesterov",
            "optimizer",
            "weight_decay",
        )
    },
    "apply_wd_to_qk_layernorm": "optimizer.no_weight_decay",
    "decoupled_lr": "model.mup_base_hidden_size",
    "decoupled_min_lr": "schedule.min_lr_ratio",
    "min_lr": "schedule.min_lr_ratio",
    "check_for_large_grads": "train.spike_threshold",
    "check_for_nan_in_grad": "train.on_divergence",
    "moe_enable_deepep": "megatron.moe_token_dispatcher_type",
    "moe_layer_recompute": "megatron.recompute_modules",
    "moe_per_layer_logging": "statistics.router.interval",
    "log_max_attention_logit": "statistics.moments.interval",
    "transformer_impl": "backend",
}
"""Field → the key whose value it follows."""
