"""From our configuration to Megatron-Core's TransformerConfig: the one place where names and defaults meet."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import quick_gelu, squared_relu
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from sparsecod_megatron.config import ModelConfig, ParallelConfig, RunConfig
from sparsecod_megatron.config.check_megatron import needs_transformer_engine
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.model.init import leave_as_is
from sparsecod_megatron.model.latent_attention import latent_fields
from sparsecod_megatron.model.passthrough import passthrough
from sparsecod_megatron.model.precision import precision_fields, torch_dtype
from sparsecod_megatron.seams.mechanism import configured

FIXED_FIELDS: dict[str, Any] = {
    # `init.py` draws every matrix. Without `perform_initialization` Megatron would not mark which are sharded.
    "init_method": leave_as_is,
    "output_layer_init_method": leave_as_is,
    "embedding_init_method": leave_as_is,
    # Megatron's per-token mode would scale the auxiliary losses down by the tensor- and context-parallel sizes.
    # Every micro-batch holds the same number of counted tokens, so the mean of means is the mean over tokens.
    "calculate_per_token_loss": False,
}
"""What every run has, whatever its file says."""


def transformer_config(config: RunConfig, *, transformer_engine: bool) -> TransformerConfig:
    """Megatron-Core's configuration of this run's model and layout. Local.

    Args:
        config: a checked run.
        transformer_engine: whether the fused CUDA modules are used.

    Raises:
        ConfigError: Megatron-Core refuses the combination, or a `megatron:` field has no effect on this backend.
    """
    dtype = torch_dtype(config.precision)
    sections: dict[str, Any] = {
        **_shape(config.model),
        **_attention(config.model),
        **_activation(config.model),
        **_experts(config.model),
        **_layout(config.parallel, dtype),
        "hetereogenous_dist_checkpoint": layers_differ(config),  # the misspelling is Megatron's
        **precision_fields(config.precision),
    }
    defaults = {
        "moe_grouped_gemm": transformer_engine and config.model.is_moe,
        "moe_token_dispatcher_type": "alltoall",
        # The fused GeGLU is the tanh approximation, and the others have none without bias.
        "bias_activation_fusion": config.model.activation == "swiglu" and not config.megatron.get("glu_linear_offset"),
        "apply_rope_fusion": _has_fused_rope(config, transformer_engine),
        # Megatron-Core refuses it beside experts with biases (experts.py:530).
        "bias_dropout_fusion": transformer_engine and not (config.model.is_moe and config.model.mlp_bias),
        # Megatron-Core's rounds its gradient to bf16 whatever the model's type (fused_cross_entropy.py:82).
        "cross_entropy_loss_fusion": transformer_engine and dtype == torch.bfloat16,
        # Of Megatron-Core's own layers: the CPU backend has a function for it, and CUDA an extension of apex.
        # Transformer Engine's have their own (`fuse_weight_gradients`).
        "gradient_accumulation_fusion": layers._grad_accum_fusion_available,
        # A ring of keys, which Transformer Engine would choose, has no window (its context_parallel.py:4026).
        "cp_comm_type": _exchange_of_keys(config.model),
        **_exchange_between_stages(config.parallel, config.megatron),
    }
    for mechanism in configured(config):
        defaults |= mechanism.transformer_fields(config.model)
    _refuse_unread(config.megatron, transformer_engine)
    arguments = passthrough(
        config.megatron, TransformerConfig, sections=sections, fixed=FIXED_FIELDS, defaults=defaults
    )
    if (attention := config.megatron.get("attention_backend")) is not None:
        arguments["attention_backend"] = AttnBackend[attention]
    _forbid_silent_divergence(arguments)
    target = TransformerConfig
    if config.model.multi_latent_attention:
        target, arguments = MLATransformerConfig, arguments | latent_fields(config.model)
    try:
        megatron = target(**arguments)
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        # Many of its assertions have no text but their own.
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(f"model/parallel/megatron: Megatron-Core refuses this combination: {reason}") from error
    for name, value in _yarn(config.model).items():
        setattr(megatron, name, value)
    return megatron


def _exchange_of_keys(model: ModelConfig) -> str | None:
    """Between context-parallel ranks, in Transformer Engine; None leaves it the choice."""
    if model.softmax_type != "vanilla":
        return "a2a"  # its others have no sinks (context_parallel.py:4046)
    return None if model.sliding_window is None else "all_gather"


def layers_differ(config: RunConfig) -> bool:
    """Whether layers of one kind have different parameters, so that checkpoints hold them one by one, not stacked."""
    differ = (mechanism.layers_differ(config.model) for mechanism in configured(config))
    return config.model.norm_placement == "mix" or any(differ)


def _shape(model: ModelConfig) -> dict[str, Any]:
    names = (
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "normalization",
        "layernorm_epsilon",
        "layernorm_zero_centered_gamma",
        "hidden_dropout",
        "attention_dropout",
    )
    return {
        **{name: getattr(model, name) for name in names},
        "num_query_groups": model.query_groups,
        "kv_channels": model.value_channels,
    }


def _attention(model: ModelConfig) -> dict[str, Any]:
    return {
        # By it Megatron-Core sums gradients of weights that every tensor-parallel rank holds whole.
        "qk_layernorm": model.qk_norm and not model.norms_projections,
        "attention_output_gate": model.attention_output_gate != "none",
        "add_qkv_bias": model.qkv_bias,
        # Megatron counts the keys to the left, without the query's own.
        "window_size": None if model.sliding_window is None else (model.sliding_window - 1, 0),
        "window_attn_skip_freq": model.window_attn_skip_freq,
        "no_rope_freq": model.no_rope_freq,
        "softmax_scale": model.softmax_scale,
        "softmax_type": model.softmax_type,
    }


def _yarn(model: ModelConfig) -> dict[str, Any]:
    """Attributes that GPTModel looks for on the configuration although they are not fields of it (gpt_model.py:179)."""
    if model.rope_scaling != "yarn" or model.multi_latent_attention:
        return {}
    return {
        "yarn_rotary_scaling_factor": model.rope_scaling_factor,
        "yarn_original_max_position_embeddings": model.rope_original_max_position_embeddings,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": model.yarn_correction_range_round_to_int,
    }


def _has_fused_rope(config: RunConfig, transformer_engine: bool) -> bool:
    """YaRN scales what it rotates, which no fused kernel does; ours on CPU knows neither packed documents nor pairs.

    Nor does one rotate the shared key of latent attention by our keys (`LATENT_CONFLICTS`).

    CUDA has one only with Transformer Engine.
    """
    model = config.model
    if model.multi_latent_attention or model.rope_scaling == "yarn" or rope_utils.fused_apply_rotary_pos_emb is None:
        return False
    unknown = config.data.reset_attention_mask or config.megatron.get("rotary_interleaved", False)
    return transformer_engine or not unknown


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "clamped_swiglu": quick_gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": squared_relu,
}


def _activation(model: ModelConfig) -> dict[str, Any]:
    clamped: dict[str, Any] = {}
    if model.activation == "clamped_swiglu":
        clamped = {"glu_linear_offset": 1.0, "activation_func_clamp_value": model.activation_func_clamp_value}
    return clamped | {
        "gated_linear_unit": model.is_gated,
        "activation_func": _ACTIVATIONS[model.activation],
        # Attention reads it too, from a copy of its own where that differs (`specs.py`).
        "add_bias_linear": model.mlp_bias,
    }


def _experts(model: ModelConfig) -> dict[str, Any]:
    if not model.is_moe:
        return {}
    same_name = (
        "num_moe_experts",
        "moe_router_topk",
        "moe_shared_expert_intermediate_size",
        "moe_shared_expert_gate",
        "moe_router_score_function",
        "moe_router_pre_softmax",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_group_topk",
        "moe_router_dtype",
        "moe_router_load_balancing_type",
        "moe_router_enable_expert_bias",
        "moe_router_bias_update_rate",
        "moe_expert_capacity_factor",
    )
    return {
        **{name: getattr(model, name) for name in same_name},
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_layer_freq": [int(model.is_moe_layer(layer)) for layer in range(model.num_layers)]
        if model.moe_first_k_dense_layers
        else 1,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff if model.moe_router_load_balancing_type != "none" else 0.0,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
    }


def _layout(parallel: ParallelConfig, dtype: torch.dtype) -> dict[str, Any]:
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


def _exchange_between_stages(parallel: ParallelConfig, asked: dict[str, Any]) -> dict[str, Any]:
    """As Megatron-LM has it on NCCL; gloo exchanges one tensor at a time (docs/GPU.md)."""
    nccl, interleaved = torch.cuda.is_available(), parallel.virtual_pipeline_model_parallel_size is not None
    overlap = asked.get("overlap_p2p_comm", nccl and interleaved and not asked.get("batch_p2p_comm"))
    return {
        "overlap_p2p_comm": overlap,
        "batch_p2p_comm": nccl and not overlap,
        "deallocate_pipeline_outputs": True,
    }


def _refuse_unread(fields: dict[str, Any], transformer_engine: bool) -> None:
    """Fields whose module or package is not there; what needs no machine to know is refused with the configuration."""
    for field in fields:
        if not transformer_engine and (obstacle := needs_transformer_engine(field)):
            raise ConfigError(f"megatron.{field}: {fields[field]!r}, but {obstacle}")
    if fields.get("gradient_accumulation_fusion") and not layers._grad_accum_fusion_available:
        raise ConfigError(
            "megatron.gradient_accumulation_fusion: true, but Megatron-Core's own layers need apex's extension for it; "
            "remove it (Transformer Engine's layers do it all the same) or install apex"
        )
    if fields.get("moe_token_dispatcher_type") != "flex":
        return
    if not transformer_engine:
        raise ConfigError(
            "megatron.moe_token_dispatcher_type: 'flex', but DeepEP runs on CUDA, and here beside Transformer Engine "
            "alone; use alltoall"
        )
    if importlib.util.find_spec("deep_ep") is None:
        raise ConfigError("megatron.moe_token_dispatcher_type: 'flex' needs DeepEP; install deep_ep or use alltoall")


def _forbid_silent_divergence(arguments: dict[str, Any]) -> None:
    """Settings under which gloo trains without an error and without being right."""
    if torch.cuda.is_available():
        return
    for key in ("batch_p2p_comm", "overlap_p2p_comm"):
        if arguments[key]:
            raise ConfigError(f"megatron.{key}: true gives wrong gradients on the CPU backend; remove it")
