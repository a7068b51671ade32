"""Which family expresses a model exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.llama import LLAMA, MISTRAL
from sparsecod_megatron.hf.families.mixtral import MIXTRAL
from sparsecod_megatron.hf.families.qwen2_moe import QWEN2_MOE

FAMILIES = (LLAMA, MISTRAL, MIXTRAL, QWEN2_MOE)
"""In order of preference: the most widely supported class first."""

SHAPE_KEYS = frozenset(
    {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "vocab_size",
        "untie_embeddings_and_output_weights",
        "activation",
        "embedding_norm",
        "normalization",
        "layernorm_epsilon",
        "rotary_base",
        "num_moe_experts",
        "moe_router_topk",
        "moe_router_pre_softmax",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
    }
)
"""Keys that decide what a model computes, and that the families read."""
BEYOND_KEYS = frozenset(
    {
        "norm_placement",
        "layernorm_scaling",
        "final_norm",
        "qk_norm",
        "rope_scaling",
        "sliding_window",
        "attention_output_gate",
        "moe_router_topk_per_layer",
        "moe_first_k_dense_layers",
        "moe_shared_expert_gate",
        "moe_router_score_function",
        "moe_router_topk_scaling_factor",
        "moe_router_num_groups",
        "moe_router_enable_expert_bias",
        "moe_expert_capacity_factor",
    }
)
"""Keys that decide what a model computes, and that no family here has a place for unless they have their defaults."""
DEPENDENT_KEYS = frozenset(
    {
        "preset",
        "mix_post_fraction",
        "rope_scaling_factor",
        "rope_original_max_position_embeddings",
        "window_attn_skip_freq",
        "moe_router_group_topk",
        "moe_router_dtype",
    }
)
"""Keys without an effect while those above have their defaults."""
TRAINING_KEYS = frozenset(
    {
        "make_vocab_size_divisible_by",
        "hidden_dropout",
        "attention_dropout",
        "init",
        "init_method_std",
        "init_std",
        "mup_base_hidden_size",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_z_loss_coeff",
        "moe_router_bias_update_rate",
    }
)
"""Keys that a trained model no longer depends on. A key of ModelConfig in no set is refused unless it has its default,
so that no export leaves a new feature out without a word."""
EXPRESSED_VALUES = {"activation": ("swiglu",), "normalization": ("RMSNorm",), "embedding_norm": (None, False)}
"""Keys that some values of are beyond every family, and the values that are not."""


def choose_family(model: ModelConfig, families: Sequence[Family] = FAMILIES) -> Family:
    """The first family that computes the same function as the model.

    Args:
        model: ours.
        families: candidates, best first.

    Returns:
        The family.

    Raises:
        ConversionError: none does; the message names the features in the way.
    """
    _check_keys(model)
    obstacles = []
    for family in families:
        obstacle = family.obstacle(model)
        if obstacle is None:
            return family
        obstacles.append(f"{family.architecture}: {obstacle}")
    raise ConversionError(
        f"model: none of these transformers classes expresses it ({'; '.join(obstacles)}); "
        "only models without these features convert"
    )


def _check_keys(model: ModelConfig) -> None:
    neutral = type(model)()
    for field in dataclasses.fields(model):
        value, default = getattr(model, field.name), getattr(neutral, field.name)
        expressed = EXPRESSED_VALUES.get(field.name)
        if (expressed and value not in expressed) or (
            field.name not in SHAPE_KEYS | TRAINING_KEYS | DEPENDENT_KEYS and value != default
        ):
            raise ConversionError(
                f"model.{field.name}: {value} has no counterpart in a stock transformers class; only models with "
                f"{' or '.join(map(str, expressed or (default,)))} convert"
            )
