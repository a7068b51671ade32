"""Which family expresses a model exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.config.model_keys import TRAINING_KEYS
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import stated
from sparsecod_megatron.hf.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from sparsecod_megatron.hf.families.gemma import GEMMA, GEMMA2, GEMMA3
from sparsecod_megatron.hf.families.glm_moe import GLM4_MOE
from sparsecod_megatron.hf.families.gpt_oss import GPT_OSS
from sparsecod_megatron.hf.families.granite import GRANITE
from sparsecod_megatron.hf.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3
from sparsecod_megatron.hf.families.mixtral import MIXTRAL
from sparsecod_megatron.hf.families.neox import NEOX
from sparsecod_megatron.hf.families.olmo import OLMO2, OLMO3, OLMOE
from sparsecod_megatron.hf.families.phi3 import PHI3
from sparsecod_megatron.hf.families.qwen_moe import QWEN2_MOE, QWEN3_MOE
from sparsecod_megatron.hf.families.smollm3 import SMOLLM3
from sparsecod_megatron.hf.families.sparsecod import SPARSECOD
from sparsecod_megatron.hf.table import NameTable
from sparsecod_megatron.seams.mechanism import Mechanism, Module, Refused

FAMILIES = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, PHI3, GRANITE, OLMO2, OLMO3, GEMMA, GEMMA2, GEMMA3, NEOX),
    *(MIXTRAL, QWEN2_MOE, QWEN3_MOE, GLM4_MOE, OLMOE, GPT_OSS, DEEPSEEK_V3, DEEPSEEK_V2, SPARSECOD),
)
"""In order of preference: the most widely supported class first, our own last."""

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
        "layernorm_epsilon",
        "rotary_base",
        "num_moe_experts",
        "moe_router_topk",
        "moe_router_pre_softmax",
        "moe_ffn_hidden_size",
        "moe_shared_expert_intermediate_size",
    }
)
"""Keys that decide what a model computes, and that every family reads."""
FEATURES: dict[str, tuple[object, ...]] = {
    "activation": ("swiglu",),
    "normalization": ("RMSNorm",),
    "norm_placement": ("pre",),
    "layernorm_scaling": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "embedding_norm": (None, False),
    "final_norm": (True,),
    "qk_norm": (False,),
    "qk_norm_scope": ("head",),
    "rope_scaling": ("none",),
    "rotary_percent": (1.0,),
    "rotary_base_local": (None,),
    "no_rope_freq": (None,),
    "sliding_window": (None,),
    "window_attn_skip_freq": (None,),
    "softmax_scale": (None,),
    "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "softmax_type": ("vanilla",),
    "attention_output_gate": ("none",),
    "qkv_bias": (False,),
    "attention_output_bias": (False,),
    "mlp_bias": (False,),
    "multi_latent_attention": (False,),
    "moe_router_topk_per_layer": (None,),
    "moe_first_k_dense_layers": (0,),
    "moe_shared_expert_gate": (False,),
    "moe_router_score_function": ("softmax",),
    "moe_router_topk_scaling_factor": (None, 1.0),
    "moe_router_num_groups": (None,),
    "moe_router_enable_expert_bias": (False,),
    "moe_expert_capacity_factor": (None,),
}
"""Keys that decide what a model computes, and the values that any family expresses; others need it in `features`."""
DEPENDENT_KEYS = frozenset(
    {
        "mix_post_fraction",
        "rope_scaling_factor",
        "yarn_correction_range_round_to_int",
        "activation_func_clamp_value",
        "rope_original_max_position_embeddings",
        "moe_router_group_topk",
        "moe_router_dtype",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_head_dim",
        "qk_pos_emb_head_dim",
        "v_head_dim",
        "mscale",
        "mscale_all_dim",
    }
)
"""Keys without an effect of their own beside those above."""


def exported_modules(model: ModelConfig, mechanisms: Sequence[Mechanism]) -> dict[str, Module]:
    """What the mechanisms add to a HuggingFace model, by name; nothing where the weights say it all.

    Raises:
        ConversionError: one of them cannot be exported.
    """
    modules: dict[str, Module] = {}
    for mechanism in mechanisms:
        way = mechanism.export(model)
        if isinstance(way, Refused):
            raise ConversionError(f"mechanisms.{mechanism.name}: {way.reason}")
        if isinstance(way, Module):
            modules[mechanism.name] = way
    return modules


def choose_family(
    model: ModelConfig, families: Sequence[Family] = FAMILIES, *, modules: Mapping[str, Module] | None = None
) -> Family:
    """The first family that computes the same function as the model.

    Args:
        model: ours.
        families: candidates, best first.
        modules: what `exported_modules` gave.

    Returns:
        The family.

    Raises:
        ConversionError: none does; the message names the features in the way.
    """
    _check_keys(model)
    obstacles = []
    for family in families:
        added = "" if family.extensible else ", ".join(f"mechanisms.{name}" for name in modules or {})
        obstacle = _missing_feature(model, family) or family.obstacle(model) or added or None
        if obstacle is None:
            return family
        obstacles.append(f"{family.architecture}: {obstacle}")
    raise ConversionError(
        f"model: none of these classes expresses it ({'; '.join(obstacles)}); "
        "only models without these features convert"
    )


def family_of(config: PreTrainedConfig) -> Family | None:
    """The family that reads a configuration, if one does."""
    return next((family for family in FAMILIES if type(config) is family.config_class), None)


def names_in(model: PreTrainedModel) -> Callable[[str], str]:
    """What a model calls a module or tensor, by its name in a Llama."""
    family = family_of(model.config)
    return str if family is None else family.named


def name_table(model: ModelConfig, mechanisms: Sequence[Mechanism] = ()) -> NameTable:
    """The names of the family that expresses a model with these mechanisms.

    Raises:
        ConversionError: none does.
    """
    modules = exported_modules(model, mechanisms)
    return choose_family(model, modules=modules).table(model, modules)


def _missing_feature(model: ModelConfig, family: Family) -> str | None:
    for key, neutral in FEATURES.items():
        value = getattr(model, key)
        is_of_experts = key.startswith("moe_")
        if key not in family.features and value not in neutral and (model.is_moe or not is_of_experts):
            return stated(model, key)
    return None


def _check_keys(model: ModelConfig) -> None:
    """Refuse what no family could have: dropped tokens, and keys in no set, which may be new features."""
    if model.is_moe and model.moe_expert_capacity_factor is not None:
        raise ConversionError(
            f"model.moe_expert_capacity_factor: {model.moe_expert_capacity_factor} drops tokens by what else is in the "
            "batch, which no exported model does; train the last steps without it, or set it to null in config.yaml"
        )
    known = SHAPE_KEYS | FEATURES.keys() | TRAINING_KEYS.keys() | DEPENDENT_KEYS
    for field in dataclasses.fields(model):
        value, default = getattr(model, field.name), getattr(type(model)(), field.name)
        if field.name not in known and value != default:
            raise ConversionError(
                f"model.{field.name}: {value} has no counterpart in any class; only models with {default} convert"
            )
