"""Tiny models of each layout of weights, with random weights, and their tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from sparsecod_megatron.hf.configuration_sparsecod import SparsecodConfig
from sparsecod_megatron.hf.modeling_sparsecod import SparsecodForCausalLM

VOCAB_SIZE = 67
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHARED = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts_per_tok": 2}
GATES = {"moe_router_topk": 2, "moe_router_enable_expert_bias": True, "attention_output_gate": "elementwise"}
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **changes: LlamaForCausalLM(LlamaConfig(**SIZES | changes, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=5)),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **SHARED, num_experts=4)),
    "sparsecod": lambda: SparsecodForCausalLM(SparsecodConfig(**SIZES, **GATES, num_moe_experts=4)),
}


def tiny(name: str, **changes: float) -> PreTrainedModel:
    """A model in evaluation mode, the same each time. No token reaches the last expert of `mixtral` and `sparsecod`."""
    torch.manual_seed(1)
    model = MODELS[name](**changes)
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
        for layer in model.model.layers:
            if name == "mixtral":  # logits a, -a, a/2, -a/2 and 0: the last is never among the two largest
                layer.mlp.gate.weight[1:] = torch.tensor([[-1.0], [0.5], [-0.5], [0.0]]) * layer.mlp.gate.weight[0]
            elif name == "sparsecod":
                layer.mlp.gate.expert_bias[-1] = -1e4
    return model.eval()


def sequences(count: int = 8, length: int = 16, seed: int = 5) -> torch.Tensor:
    """[count, length] random ids."""
    return torch.randint(VOCAB_SIZE, (count, length), generator=torch.Generator().manual_seed(seed))
