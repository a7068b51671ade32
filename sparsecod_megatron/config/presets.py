"""Models by name: `model: {preset: dense-1B}`.

One table for every size, so that a YAML file names its model and lists only what differs from it. The paper's
models come first, then small ones of the same proportions for a CPU: depth, FFN to hidden size and share of active
experts are kept, the width falls to what trains in minutes (under 20M parameters with a vocabulary of 8,192).

Source: When Does Sparsity Mitigate the Curse of Depth in LLMs (arXiv 2603.15389). `ling-mini`: Ling 2.0 (arXiv
2510.22115) and the published configuration of Ling-mini-2.0, without multi-token prediction. `deepseek-v2-lite`:
DeepSeek-V2 (arXiv 2405.04434), appendix B, and the published sizes, before its context was extended.
"""

from __future__ import annotations

import difflib
from typing import Any

from sparsecod_megatron.errors import ConfigError

DEPTH_SWEEP = (12, 16, 20, 24, 28, 32)
"""Depths at which the paper trains the dense model of one width."""

_COMMON: dict[str, Any] = {
    "normalization": "RMSNorm",
    "norm_placement": "pre",
    "activation": "swiglu",
    "rotary_base": 10000,
    "untie_embeddings_and_output_weights": True,
    "init": "normal",  # scaled output projections would hide the growth of variance with depth
    "init_method_std": 0.02,
}
_GPT_NEOX = 50304
"""Vocabulary of the paper: the GPT-NeoX tokenizer's 50,280 entries, padded."""


def _dense(layers: int, hidden: int, heads: int, ffn: int, *, vocab: int | None = _GPT_NEOX) -> dict[str, Any]:
    """A dense model; `vocab` None leaves the vocabulary to the tokenizer."""
    shape = {"num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads, "ffn_hidden_size": ffn}
    return {**_COMMON, **shape, "vocab_size": vocab}


def _moe(
    layers: int,
    hidden: int,
    heads: int,
    expert_ffn: int,
    *,
    topk: int,
    experts: int,
    shared: int | None = None,
    vocab: int | None = _GPT_NEOX,
) -> dict[str, Any]:
    """A model whose every layer has `experts` experts, `topk` of them and a shared one of width `shared` active."""
    return {
        **_dense(layers, hidden, heads, expert_ffn, vocab=vocab),
        "num_moe_experts": experts,
        "moe_router_topk": topk,
        "moe_ffn_hidden_size": expert_ffn,
        "moe_shared_expert_intermediate_size": shared,
        "moe_router_score_function": "softmax",
        "moe_router_pre_softmax": True,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 1e-2,
        "moe_z_loss_coeff": 1e-3,
    }


def _ling(
    hidden: int, heads: int, groups: int, ffn: int, expert_ffn: int, *, topk: int, experts: int, vocab: int | None
) -> dict[str, Any]:
    """Ling 2.0: 20 layers, the first dense; experts of which 1/32 are active, in groups of which half are."""
    return {
        **_moe(20, hidden, heads, expert_ffn, topk=topk, experts=experts, shared=expert_ffn, vocab=vocab),
        "ffn_hidden_size": ffn,
        "num_query_groups": groups,
        "qk_norm": True,
        "rotary_base": 600_000,
        "rotary_percent": 0.5,
        "layernorm_epsilon": 1e-6,
        "moe_first_k_dense_layers": 1,
        "moe_router_score_function": "sigmoid",
        "moe_router_pre_softmax": False,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_router_num_groups": topk,  # of which half are chosen, each for two experts
        "moe_router_group_topk": topk // 2,
        "moe_router_load_balancing_type": "none",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_zero_mean": True,
        "moe_z_loss_coeff": 3.5e-6,
    }


def _deepseek(
    layers: int, hidden: int, heads: int, ffn: int, expert_ffn: int, latent: int, head: int
) -> dict[str, Any]:
    """DeepSeek-V2-Lite: the first layer dense, 6 of 64 experts and two shared ones, keys and values from a latent.

    Queries have none. A head's channels that rotate are half of those that do not.
    """
    return {
        **_moe(layers, hidden, heads, expert_ffn, topk=6, experts=64, shared=2 * expert_ffn, vocab=None),
        "ffn_hidden_size": ffn,
        "layernorm_epsilon": 1e-6,
        "moe_first_k_dense_layers": 1,
        "multi_latent_attention": True,
        "kv_lora_rank": latent,
        "qk_head_dim": head,
        "qk_pos_emb_head_dim": head // 2,
        "v_head_dim": head,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": 1e-3,
        "moe_z_loss_coeff": 0.0,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # name                 layers hidden heads FFN
    "dense-1B": _dense(16, 2048, 16, 8192),
    **{f"dense-1B-L{layers}": _dense(layers, 2048, 16, 8192) for layers in DEPTH_SWEEP},
    "dense-400M": _dense(16, 1536, 12, 4608),
    "moe-400M-2B": _moe(16, 768, 12, 1536, topk=4, experts=32, shared=1536),
    "moe-1B-7B": _moe(16, 2048, 16, 1024, topk=8, experts=64),
    # What the paper's published YAML gives under the name of the one above: experts twice as wide.
    "moe-1B-13B-ref": _moe(16, 2048, 16, 2048, topk=8, experts=64),
    "moe-ablation": _moe(32, 1120, 16, 1120, topk=8, experts=64),
    "ling-mini": _ling(2048, 16, 4, 5120, 512, topk=8, experts=256, vocab=157_184),
    "deepseek-v2-lite": _deepseek(27, 2048, 16, 10944, 1408, 512, 128) | {"vocab_size": 102_400},
    # The same in small, in the same order. Four heads everywhere: tensor parallelism of 2 and 4 divides them.
    "nano-dense": _dense(16, 128, 4, 512, vocab=None),
    **{f"nano-dense-L{layers}": _dense(layers, 128, 4, 512, vocab=None) for layers in DEPTH_SWEEP},
    "nano-dense-narrow": _dense(16, 96, 4, 288, vocab=None),
    "nano-moe-shared": _moe(16, 64, 4, 128, topk=2, experts=16, shared=128, vocab=None),
    "nano-moe": _moe(16, 128, 4, 64, topk=2, experts=16, vocab=None),
    "nano-moe-ref": _moe(16, 128, 4, 128, topk=2, experts=16, vocab=None),
    "nano-moe-ablation": _moe(32, 64, 4, 64, topk=2, experts=16, vocab=None),
    "nano-ling": _ling(64, 4, 2, 160, 16, topk=2, experts=64, vocab=None),
    "nano-deepseek": _deepseek(27, 64, 4, 320, 40, 16, 16),
}


def preset_names() -> list[str]:
    """Names that `model.preset` takes."""
    return list(PRESETS)


def preset_model(name: str) -> dict[str, Any]:
    """The keys of the `model` section that a preset sets.

    Raises:
        ConfigError: there is no such preset.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? There" if near else "there"
        raise ConfigError(f"model.preset: {name!r} is not a preset; {hint} are {', '.join(PRESETS)}")
    return dict(PRESETS[name])
