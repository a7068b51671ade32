"""From a configuration of transformers to ours, refusing whatever would not be computed the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.rotary import rope_keys

FIELDS_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "_sliding_window_pattern",
        "architectures",
        "auto_map",
        "bos_token_id",
        "chunk_size_feed_forward",
        "classifier_dropout",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_decoder",
        "label2id",
        "max_window_layers",
        "no_rope_layer_interval",
        "original_max_position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "rope_theta",
        "transformers_version",
        "use_cache",
    }
)
"""Fields that do not change the logits of an evaluated model, or that others repeat."""
MULTIPLE = 128
"""Divisor of the vocabulary, unless a model's is not a multiple of it."""
ROPE_DEFAULTS = {
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "partial_rotary_factor": 1.0,
    "attention_factor": None,
}
"""Rotary keys that may be written out with the value they have when they are not."""


def model_config(config: PreTrainedConfig, family: Family, *, where: Path) -> ModelConfig:
    """Our keys of a configuration. What they lose is found by writing them again and comparing.

    Args:
        config: an instance of `family.config_class`.
        family: that reads and writes it.
        where: the file, for messages.

    Raises:
        ConversionError: a field says something that our keys cannot.
    """
    fields = family.flat(config.to_dict())
    fields["rope_parameters"] = _plain_rope(fields["rope_parameters"])
    head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
    model = ModelConfig(
        **{
            "num_layers": fields["num_hidden_layers"],
            "hidden_size": fields["hidden_size"],
            "ffn_hidden_size": fields["intermediate_size"],
            "num_attention_heads": fields["num_attention_heads"],
            "num_query_groups": fields["num_key_value_heads"],
            "kv_channels": head_dim,
            "vocab_size": fields["vocab_size"],
            # The rows are what they are: nothing is rounded up, and any size that divides them can share them.
            "make_vocab_size_divisible_by": math.gcd(fields["vocab_size"], MULTIPLE),
            "untie_embeddings_and_output_weights": not fields["tie_word_embeddings"],
            "layernorm_epsilon": fields["rms_norm_eps"],
            "attention_dropout": float(fields["attention_dropout"]),
            "init_method_std": fields["initializer_range"],
            **rope_keys(fields["rope_parameters"], has_partial="rotary_percent" in family.features),
            **family.read(fields),
        }
    )
    _require_same(fields | {"head_dim": head_dim}, model, family, where)
    return model


def _require_same(fields: Mapping[str, Any], model: ModelConfig, family: Family, where: Path) -> None:
    if obstacle := family.obstacle(model):
        raise ConversionError(f"{where}: as {family.architecture} it would have {obstacle}; it is damaged")
    config = family.config(model, seq_length=fields["max_position_embeddings"], dtype=torch.float32, token_ids={})
    written = family.flat(config.to_dict())
    written["rope_parameters"] = _plain_rope(written["rope_parameters"])
    elsewhere = {"mechanisms"} if family.extensible else set()  # a section of its own (`HFSource.mechanisms`)
    known = (family.config_class().to_dict().keys() | {"head_dim"}) - FIELDS_WITHOUT_EFFECT - elsewhere
    for name in sorted(known):
        if fields.get(name) != written.get(name):
            raise ConversionError(
                f"{where}: {name} {fields.get(name)!r} has no counterpart in our models, which can only say "
                f"{written.get(name)!r}; import a model without it"
            )


def _plain_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    # transformers reads the older `type` only where there is no `rope_type`, and has filled that in here.
    plain = {
        name: value for name, value in parameters.items() if name != "type" and ROPE_DEFAULTS.get(name, ...) != value
    }
    return {name: float(value) if name in ("rope_theta", "factor") else value for name, value in plain.items()}
