"""What each key of the model section is for once there are weights: the one list for resuming and for exporting.

A key that is not named here decides what the weights are or what is computed with them, so
no run resumes and no model is exported with another value silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sparsecod_megatron.config.megatron_fields import FUNCTION_FIELDS
from sparsecod_megatron.config.model_schema import ModelConfig
from sparsecod_megatron.config.schema import RunConfig

TRAINING_KEYS: dict[str, str] = {
    "preset": "a name; the keys that it stands for are beside it",
    "make_vocab_size_divisible_by": "vocab_size is what came of it",
    "hidden_dropout": "noise of training",
    "attention_dropout": "noise of training",
    "init": "the weights are there",
    "init_method_std": "the weights are there",
    "init_std": "the weights are there",
    "mup_base_hidden_size": "scales initial weights and learning rates",
    "moe_router_load_balancing_type": "only the loss of training has it",
    "moe_aux_loss_coeff": "only the loss of training has it",
    "moe_z_loss_coeff": "only the loss of training has it",
    "moe_router_bias_update_rate": "moves the bias in training; the bias itself is a weight",
    "moe_router_bias_zero_mean": "moves the bias in training; the bias itself is a weight",
}
"""Key → why a trained model no longer depends on it."""

EFFECT_CONDITIONS: dict[str, Callable[[ModelConfig], bool]] = {
    "mix_post_fraction": lambda model: model.norm_placement == "mix",
    "qk_norm_scope": lambda model: model.qk_norm,
    "rope_scaling_factor": lambda model: model.rope_scaling != "none",
    "rope_original_max_position_embeddings": lambda model: model.rope_scaling in ("llama3", "yarn"),
    "window_attn_skip_freq": lambda model: model.sliding_window is not None,
    "activation_func_clamp_value": lambda model: model.activation == "clamped_swiglu",
    "yarn_correction_range_round_to_int": lambda model: model.rope_scaling == "yarn",
    "rotary_base_local": lambda model: model.sliding_window is not None,
    "ffn_hidden_size": lambda model: not model.is_moe or model.moe_first_k_dense_layers > 0,
    "moe_router_topk": lambda model: model.moe_router_topk_per_layer is None,
    **dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
        lambda model: model.multi_latent_attention,
    ),
    **dict.fromkeys(
        ("mscale", "mscale_all_dim"),
        lambda model: model.multi_latent_attention and model.rope_scaling == "yarn",
    ),
    "moe_shared_expert_gate": lambda model: model.moe_shared_expert_intermediate_size is not None,
    "moe_router_group_topk": lambda model: model.moe_router_num_groups is not None,
}
"""Keys without an effect in some models; those of experts have none in any model without them."""


class Difference(NamedTuple):
    """A key that two configurations of one model differ in.

    Attributes:
        key: dotted.
        theirs: the first one's value.
        ours: the second one's.
    """

    key: str
    theirs: Any
    ours: Any

    @property
    def described(self) -> str:
        """For a message about what was saved there."""
        return f"{self.key} is {self.theirs!r} there and {self.ours!r} here"


def model_differences(theirs: RunConfig, ours: RunConfig) -> Iterator[Difference]:
    """Keys by which the second run's model is not the first one's, or computes something else with its weights."""
    for item in dataclasses.fields(ModelConfig):
        if item.name not in TRAINING_KEYS:
            values = [_effective(config.model, item.name) for config in (theirs, ours)]
            if values[0] != values[1]:
                yield Difference(f"model.{item.name}", *values)
    for field in FUNCTION_FIELDS:
        values = [config.megatron.get(field) for config in (theirs, ours)]
        if (values[0] or None) != (values[1] or None):  # false and 0 are Megatron-Core's defaults
            yield Difference(f"megatron.{field}", *values)
    yield from mechanism_differences(theirs, ours)


def mechanism_differences(theirs: RunConfig, ours: RunConfig) -> Iterator[Difference]:
    """Settings that differ, of mechanisms that both runs have; all settings of those that only one has."""
    for name in dict.fromkeys((*theirs.mechanisms, *ours.mechanisms)):
        first, second = (
            None if (found := config.mechanisms.get(name)) is None else dataclasses.asdict(found)
            for config in (theirs, ours)
        )
        if first is None or second is None:
            yield Difference(f"mechanisms.{name}", first, second)
            continue
        for setting in first:
            if first[setting] != second[setting]:
                yield Difference(f"mechanisms.{name}.{setting}", first[setting], second[setting])


def _effective(model: ModelConfig, key: str) -> Any:
    """A key's value, None where it has no effect."""
    if key.startswith("moe_") and not model.is_moe:
        return None
    if key in EFFECT_CONDITIONS and not EFFECT_CONDITIONS[key](model):
        return None
    return model.has_embedding_norm if key == "embedding_norm" else getattr(model, key)
