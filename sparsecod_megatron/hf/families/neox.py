"""GPT-NeoX, and with it Pythia: LayerNorms, MLPs without gate, and in most models both branches of a layer at once.

Nearly every name differs from Llama's. The fused projection holds query, key and value of each head in turn, which is
Megatron-Core's own order where every head has its keys. Old files hold causal masks besides, which no class reads.

Source: transformers, models/gpt_neox/modeling_gpt_neox.py; Black et al., GPT-NeoX-20B (arXiv 2204.06745).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GPTNeoXConfig

from sparsecod_megatron.config import ModelConfig
from sparsecod_megatron.hf.families.base import Family
from sparsecod_megatron.hf.families.common import (
    ATTENTION_BIASES,
    PRE_NORM,
    dense_obstacle,
    one_attention_bias,
    other_value,
    read_attention_bias,
    stated,
)
from sparsecod_megatron.hf.families.entries import dense_entries, renamed
from sparsecod_megatron.hf.families.rotary import rope_parameters
from sparsecod_megatron.hf.transforms import Transform, same

MODULES = {
    "model": "gpt_neox",
    "embed_tokens": "embed_in",
    "self_attn": "attention",
    "o_proj": "dense",
    "up_proj": "dense_h_to_4h",
    "down_proj": "dense_4h_to_h",
    "norm": "final_layer_norm",
    "lm_head": "embed_out",
}
"""Llama's names of modules → this class's, as files have them."""
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2"}
"""Our names of activations → transformers'."""
SYNONYMS = {"gelu_fast": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}
"""Other names there of one function, of which the first is GPT-NeoX-20B's."""


def _obstacle(model: ModelConfig) -> str | None:
    if obstacle := other_value(model, normalization="LayerNorm"):
        return obstacle
    if model.norm_placement not in ("pre", "parallel"):
        return stated(model, "norm_placement")
    if model.activation not in ACTIVATIONS:
        return stated(model, "activation")
    if obstacle := other_value(model, mlp_bias=True):
        return obstacle
    if model.query_groups != model.num_attention_heads:
        return f"model.num_query_groups={model.query_groups}, not num_attention_heads"
    if model.num_attention_heads * model.head_dim != model.hidden_size:
        return f"model.kv_channels={model.head_dim}, not hidden_size / num_attention_heads"
    return dense_obstacle(model) or one_attention_bias(model)


def _fields(model: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": model.qkv_bias,
        "hidden_act": ACTIVATIONS[model.activation],
        "hidden_dropout": model.hidden_dropout,
        "use_parallel_residual": model.is_parallel,
        # Written out where all channels rotate too, because a quarter is what the class takes otherwise.
        "rope_parameters": rope_parameters(model) | {"partial_rotary_factor": model.rotary_percent},
    }


def _older_fields(model: ModelConfig) -> dict[str, Any]:
    return {"rotary_pct": model.rotary_percent, "rotary_emb_base": model.rotary_base}


def _read(fields: Mapping[str, Any]) -> dict[str, Any]:
    names = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    return read_attention_bias(fields) | {
        "normalization": "LayerNorm",
        "norm_placement": "parallel" if fields["use_parallel_residual"] else "pre",
        "activation": names.get(fields["hidden_act"], "gelu"),  # of others it is said what ours would write
        "hidden_dropout": float(fields["hidden_dropout"]),
        "mlp_bias": True,
    }


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields that all other classes have, and one name for one activation."""
    activation, heads = fields["hidden_act"], fields["num_attention_heads"]
    return {
        **fields,
        "hidden_act": SYNONYMS.get(activation, activation),
        "rms_norm_eps": fields["layer_norm_eps"],
        "num_key_value_heads": heads,
        # No field of the class, but its rotation would go by it.
        "head_dim": fields.get("head_dim") or fields["hidden_size"] // heads,
    }


def _interleaved(transform: Transform) -> Transform:
    """Rows head by head, as ours are."""
    return same(transform.megatron_shapes[0])


def _is_causal_mask(mask: Tensor) -> bool:
    """[1, 1, positions, positions], whether a query sees a key."""
    return torch.equal(mask.bool(), torch.ones_like(mask, dtype=torch.bool).tril())


def _hides(value: Tensor) -> bool:
    """What scores of hidden keys become."""
    return value.numel() == 1 and float(value) <= torch.finfo(torch.float16).min


NEOX = Family(
    "GPTNeoXForCausalLM",
    GPTNeoXConfig,
    PRE_NORM | ATTENTION_BIASES | {"normalization", "norm_placement", "activation", "mlp_bias", "rotary_percent"},
    _obstacle,
    dense_entries,
    _fields,
    _read,
    layout=partial(renamed, names={"q_proj": "query_key_value"}, change=_interleaved),
    modules=MODULES,
    spelling={"rms_norm_eps": "layer_norm_eps", "num_key_value_heads": None, "head_dim": None},
    older_fields=_older_fields,
    flat=_flat,
    derived={".attention.bias": _is_causal_mask, ".attention.masked_bias": _hides},
)
