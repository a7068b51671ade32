"""From our configuration to Megatron-Core's TransformerConfig: the one place where names and defaults meet."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.model.passthrough import passthrough


def transformer_config(config: RunConfig, *, transformer_engine: bool) -> TransformerConfig:
    """Megatron-Core's configuration of this run's model and layout. Local.

    Args:
        config: a checked run.
        transformer_engine: whether the fused CUDA modules are used.

    Raises:
        ConfigError: Megatron-Core refuses the combination, or a `megatron:` field is unknown.
    """
    dtype = torch.bfloat16 if config.precision.dtype == "bf16" else torch.float32
    ours: dict[str, Any] = {
        **_shape(config.model),
        **_experts(config.model),
        **_layout(config, dtype),
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        # Megatron's per-token mode would scale the auxiliary losses down by the tensor- and context-parallel sizes.
        # Every micro-batch holds the same number of counted tokens, so the mean of means is the mean over tokens.
        "calculate_per_token_loss": False,
    }
    defaults = {
        "moe_grouped_gemm": transformer_engine and config.model.is_moe,
        "bias_activation_fusion": True,
        "apply_rope_fusion": True,
        "bias_dropout_fusion": transformer_engine,
        "masked_softmax_fusion": transformer_engine,
        "cross_entropy_loss_fusion": transformer_engine,
        # The CPU backend has a function for it; on CUDA the extension comes with apex, which a user may not have.
        "gradient_accumulation_fusion": not torch.cuda.is_available(),
        # Batched exchange silently corrupts the interleaved schedule on gloo.
        "batch_p2p_comm": False,
        "overlap_p2p_comm": False,
    }
    arguments = passthrough(config.megatron, TransformerConfig, ours, defaults)
    _forbid_silent_divergence(arguments)
    try:
        return TransformerConfig(**arguments)
    except (ValueError, AssertionError, TypeError) as error:
        raise ConfigError(f"model/parallel/megatron: Megatron-Core refuses this combination: {error}") from error


def _shape(model: ModelConfig) -> dict[str, Any]:
    plain = {
        name: getattr(model, name)
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "normalization",
            "layernorm_epsilon",
            "hidden_dropout",
            "attention_dropout",
            "init_method_std",
        )
    }
    return {
        **plain,
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        # None is Megatron's own choice, the standard deviation over sqrt(2 · num_layers).
        "output_layer_init_method": init_method_normal(model.init_method_std) if model.init == "normal" else None,
    }


def _experts(model: ModelConfig) -> dict[str, Any]:
    if not model.is_moe:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    }


def _layout(config: RunConfig, dtype: torch.dtype) -> dict[str, Any]:
    parallel = config.parallel
    stages, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": stages,
        "virtual_pipeline_model_parallel_size": chunks,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.sequence_parallel,
        "pipeline_dtype": dtype if stages > 1 else None,
    }


def _forbid_silent_divergence(arguments: dict[str, Any]) -> None:
    """Settings under which gloo trains without an error and without being right."""
    if torch.cuda.is_available():
        return
    for key in ("batch_p2p_comm", "overlap_p2p_comm"):
        if arguments[key]:
            raise ConfigError(f"megatron.{key}: true gives wrong gradients on the CPU backend; remove it")
