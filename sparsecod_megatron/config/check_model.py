"""Models that cannot be built, or that would not compute what their keys say."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config.check_latents import latent_problems
from sparsecod_megatron.config.fields import indivisible
from sparsecod_megatron.config.model_schema import ModelConfig
from sparsecod_megatron.config.schema import RunConfig


def model_problems(config: RunConfig) -> Iterator[str]:
    """One line for each problem of the model section (and the document masks, which its attention applies)."""
    model = config.model
    yield from latent_problems(config)
    yield from _norm_problems(model)
    yield from _attention_problems(model)
    yield from _bias_problems(model)
    yield from qk_norm_problems(model, config.parallel.tensor_model_parallel_size)
    yield from _document_problems(config)
    yield from _init_problems(model)
    if model.is_moe:
        yield from depth_of_experts_problems(model)
        yield from _routing_problems(model)


def _norm_problems(model: ModelConfig) -> Iterator[str]:
    if model.layernorm_scaling and model.norm_placement in ("post", "mix"):
        why = f"has no place in norm_placement={model.norm_placement}, whose norms set the scale of the residual stream"
        yield f"model.layernorm_scaling: true {why}; use it with pre, parallel, peri, sandwich or branch"
    if model.layernorm_zero_centered_gamma and model.normalization != "RMSNorm":
        why = f"normalization={model.normalization} multiplies by its weight alone"
        yield f"model.layernorm_zero_centered_gamma: true, but {why}; use RMSNorm, or set it to false"
    if model.residual_multiplier != 1 and model.norm_placement != "pre":
        why = f"norm_placement={model.norm_placement} has a norm behind each branch, or behind the sum"
        if model.is_parallel:
            why = "norm_placement=parallel adds both branches as they are"
        yield f"model.residual_multiplier: {model.residual_multiplier:g}, but {why}; use pre, or 1"
    if model.logits_scaling != 1 and not model.final_norm:
        yield f"model.logits_scaling: {model.logits_scaling:g} is a part of the final norm, which is off; set it to 1"
    if model.layernorm_zero_centered_gamma and model.norms_projections:
        key = "model.layernorm_zero_centered_gamma"
        yield f"{key}: true, but norms of qk_norm_scope=projection multiply by their weight alone; use head"
    if not model.final_norm and model.norm_placement != "post":
        why = f"norm_placement={model.norm_placement} leaves the last residual stream unnormalised"
        yield f"model.final_norm: false, but {why}; set it to true or norm_placement to post"


def _attention_problems(model: ModelConfig) -> Iterator[str]:
    if model.kv_channels is None and not model.multi_latent_attention:
        yield from indivisible(
            "model.hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads
        )
    if model.head_dim % 2 and not model.multi_latent_attention:
        yield f"model.kv_channels: {model.head_dim} is odd, but rotary embeddings rotate pairs; use an even number"
    if (unrotated := model.no_rope_freq) is not None:
        if len(unrotated) != model.num_layers:
            yield f"model.no_rope_freq: {len(unrotated)} entries for num_layers={model.num_layers}; give one per layer"
        if not {*unrotated} <= {0, 1}:
            yield f"model.no_rope_freq: {unrotated} has other numbers than 0 and 1; give 1 for layers without rotation"
    if model.rotary_base_local is not None and model.sliding_window is None:
        yield f"model.rotary_base_local: {model.rotary_base_local}, but no layer has a window; set sliding_window too"
    if model.rotary_percent < 1:
        yield from _partial_rotation_problems(model)
    yield from indivisible(
        "model.num_attention_heads", model.num_attention_heads, "model.num_query_groups", model.query_groups
    )
    if model.window_attn_skip_freq is not None and model.sliding_window is None:
        yield (
            f"model.window_attn_skip_freq: {model.window_attn_skip_freq} needs a window; set model.sliding_window or "
            "remove it"
        )


def qk_norm_problems(model: ModelConfig, tensor: int) -> Iterator[str]:
    """One line for a scope without norm, or of heads that no rank has to itself, or of another norm."""
    key = f"model.qk_norm_scope: {model.qk_norm_scope}"
    if model.qk_norm and model.normalization != "RMSNorm":
        kind = model.normalization
        yield f"model.normalization: {kind}, but model.qk_norm has RMSNorm alone; set RMSNorm, or qk_norm to false"
    if model.qk_norm_scope != "head" and not model.qk_norm:
        yield f"{key}, but model.qk_norm is false; set it to true, or the scope to head"
    if model.norms_projections and model.query_groups % tensor:
        yield f"{key}, but {tensor} tensor-parallel ranks share {model.query_groups} key heads; lower their number"


def _bias_problems(model: ModelConfig) -> Iterator[str]:
    """Biases that Megatron-Core's modules have only with others, or not at all."""
    if model.attention_output_bias and not model.qkv_bias:
        yield "model.attention_output_bias: true, but model.qkv_bias is false; set both, or qkv_bias alone"
    if model.mlp_bias and model.is_moe and model.moe_shared_expert_intermediate_size is not None:
        yield "model.mlp_bias: true, but Megatron-Core's shared expert has none; set it to false, or remove that expert"


def _partial_rotation_problems(model: ModelConfig) -> Iterator[str]:
    rotated, key = model.head_dim * model.rotary_percent, "model.rotary_percent"
    if rotated % 2:
        yield f"{key}: {model.rotary_percent} of {model.head_dim} channels is {rotated:g}; use a share that is even"
    if model.rope_scaling in ("llama3", "yarn"):
        yield f"{key}: {model.rotary_percent}, but {model.rope_scaling} scaling rotates all channels; use 1 or linear"


def _document_problems(config: RunConfig) -> Iterator[str]:
    data, context = config.data, config.parallel.context_parallel_size
    if data.reset_attention_mask != data.reset_position_ids:
        key, other = "data.reset_position_ids", "reset_attention_mask"
        yield (
            f"{key}: {str(data.reset_position_ids).lower()}, but {other} is not; rotary positions are relative, so set "
            "both or neither"
        )
    if data.reset_attention_mask and _has_sequence_loss(config.model):
        key = "model.moe_router_load_balancing_type"
        yield f"{key}: seq_aux_loss, but data.reset_attention_mask packs all samples into one sequence; use aux_loss"
    if data.reset_attention_mask and config.model.softmax_type != "vanilla":
        why = "Transformer Engine has no sinks in packed documents"
        yield f"data.reset_attention_mask: true, but {why} (model.softmax_type); set it to false"
    if data.reset_attention_mask and context > 1:
        yield (
            f"data.reset_attention_mask: true, but parallel.context_parallel_size={context} would cut documents "
            "between ranks; use context_parallel_size=1"
        )


def _has_sequence_loss(model: ModelConfig) -> bool:
    return model.is_moe and model.moe_router_load_balancing_type == "seq_aux_loss"


def _init_problems(model: ModelConfig) -> Iterator[str]:
    if model.mup_base_hidden_size is None:
        return
    if model.init not in ("normal", "scaled"):
        yield (
            f"model.mup_base_hidden_size: init={model.init} already scales with the width; remove it or use "
            "model.init=normal"
        )
    if not model.untie_embeddings_and_output_weights:
        yield (
            "model.mup_base_hidden_size: embeddings and output layer need different learning rates; set "
            "model.untie_embeddings_and_output_weights=true"
        )


def depth_of_experts_problems(model: ModelConfig) -> Iterator[str]:
    """One line for each problem of where experts are and how many a token of each layer uses."""
    dense, layers = model.moe_first_k_dense_layers, model.num_layers
    if dense >= layers:
        yield f"model.moe_first_k_dense_layers: {dense} leaves no layer of {layers} with experts; lower it"
    per_layer = model.moe_router_topk_per_layer
    if per_layer is not None and len(per_layer) != layers:
        yield f"model.moe_router_topk_per_layer: {len(per_layer)} entries for num_layers={layers}; give one per layer"
        return
    experts = model.num_moe_experts or 0
    for layer in range(dense, layers):
        key = "model.moe_router_topk" if per_layer is None else f"model.moe_router_topk_per_layer[{layer}]"
        chosen = model.topk(layer)
        if chosen < 1:
            yield f"{key}: {chosen} is below 1; raise it"
        if chosen > experts:
            yield f"{key}: {chosen} is more than model.num_moe_experts={experts}; lower it"
        if chosen == 1 and model.moe_router_score_function == "softmax" and not model.moe_router_pre_softmax:
            reason = "with moe_router_pre_softmax=false gives every token weight 1 and the router no gradient"
            yield f"{key}: 1 {reason}; set model.moe_router_pre_softmax=true"


def _routing_problems(model: ModelConfig) -> Iterator[str]:
    yield from group_problems(model)
    sigmoid = model.moe_router_score_function == "sigmoid"
    if model.moe_router_enable_expert_bias and not sigmoid:
        needs = "Megatron-Core has it for sigmoid scores only; set model.moe_router_score_function=sigmoid"
        yield f"model.moe_router_enable_expert_bias: true, but {needs}"
    if model.moe_router_bias_zero_mean and not model.moe_router_enable_expert_bias:
        yield "model.moe_router_bias_zero_mean: true, but moe_router_enable_expert_bias is false; set both or neither"
    if sigmoid and model.moe_router_pre_softmax:
        yield "model.moe_router_pre_softmax: true, but sigmoid scores have no softmax; set it to false"
    if model.moe_shared_expert_gate and model.moe_shared_expert_intermediate_size is None:
        yield "model.moe_shared_expert_gate: true without a shared expert; set moe_shared_expert_intermediate_size"


def group_problems(model: ModelConfig) -> Iterator[str]:
    """One line for each problem of groups of experts."""
    experts, groups, chosen = model.num_moe_experts or 0, model.moe_router_num_groups, model.moe_router_group_topk
    key = "model.moe_router_group_topk"
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        yield f"{key}: {chosen} with moe_router_num_groups={groups}; set both or neither"
        return
    yield from indivisible("model.num_moe_experts", experts, "model.moe_router_num_groups", groups)
    if chosen > groups:
        yield f"{key}: {chosen} is more than moe_router_num_groups={groups}; lower it"
    counts = [model.topk(layer) for layer in range(model.num_layers) if model.is_moe_layer(layer)]
    if max(counts, default=1) > experts // groups * chosen:
        yield f"model.moe_router_topk: {max(counts)} is more than the experts of {chosen} groups; raise {key}"
    if min(counts, default=chosen) < chosen:
        yield f"{key}: {chosen} groups are chosen by moe_router_topk / moe_router_group_topk scores each; lower it"
