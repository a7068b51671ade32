"""A tiny model with random weights of each family, large enough that every block matters."""

from __future__ import annotations

import torch
import transformers
from transformers import PreTrainedModel

from sparsecod_megatron.analysis.scores.context import Context, make_context
from sparsecod_megatron.analysis.tasks.items import Items
from sparsecod_megatron.hf import configuration_sparsecod, modeling_sparsecod

VOCAB_SIZE = 67
NUM_LAYERS = 3
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
# family: class prefix, configuration, name of its block list
FAMILIES = {
    "llama": ("Llama", "LlamaConfig", GROUPED, "model.layers"),
    "qwen2": ("Qwen2", "Qwen2Config", GROUPED, "model.layers"),
    "qwen3": ("Qwen3", "Qwen3Config", GROUPED | {"head_dim": 8}, "model.layers"),
    "mistral": ("Mistral", "MistralConfig", GROUPED | {"sliding_window": 5}, "model.layers"),
    "mixtral": ("Mixtral", "MixtralConfig", GROUPED | {"num_local_experts": 5}, "model.layers"),
    "olmo": ("Olmo", "OlmoConfig", GROUPED, "model.layers"),
    "gpt_neox": ("GPTNeoX", "GPTNeoXConfig", SIZES, "gpt_neox.layers"),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", SIZES | {"n_inner": 24}, "transformer.h"),
    "gemma": ("Gemma", "GemmaConfig", GROUPED | {"head_dim": 8}, "model.layers"),
}
# Blocks of two kinds (sliding and full attention, dense and mixture), and in Gemma 2 a cap on attention and logits.
MIXED_FAMILIES = {
    "gemma2": ("Gemma2", "Gemma2Config", GROUPED | {"head_dim": 8, "sliding_window": 5}, "model.layers"),
    "qwen2_moe": (
        "Qwen2Moe",
        "Qwen2MoeConfig",
        GROUPED
        | {
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [0],
        },
        "model.layers",
    ),
    # What our exports are where no stock class computes the same.
    "sparsecod": (
        "Sparsecod",
        "SparsecodConfig",
        GROUPED | {"norm_placement": "peri", "qk_norm": True, "sliding_window": 5, "window_attn_skip_freq": 2},
        "model.layers",
    ),
    # Attention with a sink logit a head.
    "gpt_oss": (
        "GptOss",
        "GptOssConfig",
        GROUPED | {"head_dim": 8, "sliding_window": 5, "num_local_experts": 5, "num_experts_per_tok": 2},
        "model.layers",
    ),
    "gemma3": ("Gemma3", "Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 5}, "model.layers"),
}
ALL_FAMILIES = FAMILIES | MIXED_FAMILIES


def tiny(family: str, **changes: float) -> PreTrainedModel:
    """A model in evaluation mode; the same weights each time."""
    prefix, config, sizes, _ = ALL_FAMILIES[family]
    name = prefix if prefix.endswith("Model") else f"{prefix}ForCausalLM"
    torch.manual_seed(1)
    modules = (configuration_sparsecod, modeling_sparsecod) if family == "sparsecod" else (transformers, transformers)
    model: PreTrainedModel = getattr(modules[1], name)(getattr(modules[0], config)(**(sizes | changes)))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def tokens(count: int = 4000, seed: int = 5) -> torch.Tensor:
    """[count] random ids."""
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed))


def context(
    model: PreTrainedModel,
    *,
    num_samples: int = 5,
    seq_length: int = 11,
    reference: bool = False,
    memory_gib: float = 2.0,
    items: Items | None = None,
) -> Context:
    """A sample of random tokens."""
    return make_context(
        model,
        tokens(),
        num_samples=num_samples,
        seq_length=seq_length,
        seed=3,
        reference=reference,
        memory_gib=memory_gib,
        items=items,
    )
