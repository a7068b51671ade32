"""Every causal language model of transformers made tiny from its own default configuration, by names of sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from sparsecod_megatron.analysis.scores.context import make_context
from sparsecod_megatron.analysis.scores.registry import find_scores
from sparsecod_megatron.errors import SparsecodError
from tests.helpers.questions import random_items

FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
VOCAB_SIZE = 61
MAX_PARAMETERS = 400_000
WIDTH = 32
_SIZES = {
    VOCAB_SIZE: ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"),
    WIDTH: (
        *("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "word_embed_proj_dim", "ffn_hidden_size"),
        *("lru_width", "attention_hidden_size", "hidden_dim", "backbone_hidden_size", "cross_hidden_size"),
        *("mamba_d_ssm", "index_head_dim"),
    ),
    48: (
        *("intermediate_size", "decoder_ffn_dim", "encoder_ffn_dim", "ffn_dim", "dff", "dim_ff", "n_inner"),
        *("intermediate_size_mlp", "shared_intermediate_size", "block_ff_dim", "feed_forward_size"),
        *("dense_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        "shared_experts_intermediate_size",
    ),
    24: ("moe_intermediate_size", "expert_ffn_hidden_size"),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
        *("linear_num_heads", "index_n_heads", "qk_rope_head_dim", "mamba_d_conv", "mamba_n_heads", "mamba_num_heads"),
        *("swa_num_attention_heads", "mamba_d_state", "linear_num_value_heads", "num_attention_head"),
        *("index_topk", "laurel_rank", "rotary_dim", "num_codebooks", "n_mamba_heads", "time_step_rank"),
        *("mamba_dt_rank", "ssm_state_size", "state_size"),
    ),
    2: (
        *("num_key_value_heads", "num_kv_heads", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"),
        *("linear_num_key_heads", "swa_num_key_value_heads", "decoder_layers", "encoder_layers", "n_groups"),
        *("mamba_n_groups", "num_encoder_layers", "num_decoder_layers", "num_layers_per_stack", "kv_heads"),
    ),
    1: ("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "n_shared_experts"),
    8: (
        *("head_dim", "v_head_dim", "qk_nope_head_dim", "linear_head_dim", "linear_key_head_dim", "swa_head_dim"),
        *("linear_value_head_dim", "dim_head", "attention_head_dim", "kv_channels", "attention_head_size"),
        *("mamba_d_head", "mamba_head_dim", "hidden_size_per_layer_input", "sliding_window", "attention_window_size"),
        *("window_size", "local_attention", "chunk_size", "mamba_chunk_size", "sliding_window_size"),
    ),
    16: ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "gated_norm_rank"),
    12: ("qk_head_dim",),
    64: (
        *("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "model_max_length", "context_length"),
        "original_max_position_embeddings",
    ),
}
_SIZE_OF = {name: size for size, names in _SIZES.items() for name in names}
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_KINDS = (
    *("layer_types", "mlp_layer_types", "indexer_types", "layers_block_type", "block_types"),
    "mtp_layers_block_type",
)
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bigbird_pegasus": {"is_decoder": True},
    "dbrx": {"max_seq_len": 64},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "mlp"] * 3,
    },
    "deepseek_v2": _MIXTURE,
    "dots1": _MIXTURE,
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "intermediate_size": [48, 48],
        "activation_sparsity_pattern": [0.5, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
    "xlnet": {"d_inner": 48, "d_head": 8},
    "zamba": {
        "num_hidden_layers": 3,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    },
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "n_mamba_heads": 8},
}
"""What a family needs besides: sizes that must fit each other, or a part that its default leaves out."""


def tiny_config(family: str) -> PretrainedConfig:
    """The default configuration with every size that is known by name made small."""
    kind = CONFIG_MAPPING[family]
    return kind(**_shrunk(kind().to_dict()) | _OWN.get(family, {}))


def tiny_decoder(family: str) -> PreTrainedModel | None:
    """A random model in evaluation mode, the same each time; None where it cannot be made tiny.

    Freshly initialised matrices are scaled so that blocks, heads, neurons and routers differ.
    """
    try:
        config = tiny_config(family)
        with torch.device("meta"):
            size = AutoModelForCausalLM.from_config(config).num_parameters()
    except Exception:  # whatever a class of transformers says of sizes that do not fit together
        return None
    if size > MAX_PARAMETERS:
        return None
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.normal_(std=0.2)
        elif parameter.ndim > 1 and parameter.abs().max() < 0.2:
            parameter.mul_(8)
    return model


def outcomes(family: str, scores: Sequence[str]) -> dict[str, str] | str | None:
    """What the scores say of a tiny model: empty, or the line that refuses it.

    Args:
        family: of `FAMILIES`.
        scores: names.

    Returns:
        One entry a score; one line where the model itself is refused; None where it cannot be made tiny.
    """
    model = tiny_decoder(family)
    if model is None:
        return None
    tokens = torch.randint(3, VOCAB_SIZE, (52,), generator=torch.Generator().manual_seed(1))
    try:
        context = make_context(model, tokens, num_samples=4, seq_length=12, seed=0, items=random_items(VOCAB_SIZE))
    except SparsecodError as error:
        return str(error)
    found = {}
    for score in find_scores(scores):
        try:
            result = score.run(context)
            assert result.values and result.tables[score.name]
            found[score.name] = ""
        except SparsecodError as error:
            found[score.name] = str(error)
    return found


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    kinds = {name: list(dict.fromkeys(values[name])) for name in _KINDS if isinstance(values.get(name), list)}
    depth = max([2, *map(len, kinds.values())])
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name.endswith("config"):
            changes[name] = _shrunk(value)
        elif name in _DEPTHS:
            changes[name] = depth
        elif name in kinds:
            changes[name] = (kinds[name] * depth)[:depth]
        elif name.endswith("token_id") and value is not None:
            changes[name] = 0
        elif name in _SIZE_OF and isinstance(value, int):
            changes[name] = min(value, _SIZE_OF[name])
        elif name == "model_type":
            changes[name] = value
    if "kv_lora_rank" in values:  # latent attention has as many key heads as heads
        changes |= {"num_key_value_heads": 4, "head_dim": 4}
    elif values.get("head_dim", 0) is None:
        changes["head_dim"] = 8
    return changes
