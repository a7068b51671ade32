"""Tiny random models of many families, samples to run them on, and a mixture whose experts are separate modules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sparsecod_megatron.analysis.scores.context import Context, make_context

VOCAB = 61
_GQA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {**_GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": False}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_NEOX = {key: value for key, value in _GQA.items() if key not in ("num_key_value_heads", "head_dim")}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _GQA,
    "mistral": {**_GQA, "sliding_window": 5},
    "qwen3": _GQA,
    "gemma2": {**_GQA, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gpt2": _GPT2,
    "gpt_neox": _NEOX,
    "mixtral": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_MOE, "num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "olmoe": {**_GQA, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
}
SCALE = 8.0
"""Freshly initialised models attend nearly uniformly; larger weights make their heads, neurons and routers differ."""


def tiny_model(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of a family, in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(SCALE)
    return model


def sample(model: PreTrainedModel, *, num_samples: int = 4, seq_length: int = 24, **options: Any) -> Context:
    """A context of random tokens."""
    tokens = torch.randint(3, VOCAB, (num_samples * (seq_length + 1),), generator=torch.Generator().manual_seed(1))
    return make_context(model, tokens, num_samples=num_samples, seq_length=seq_length, seed=0, **options)


@torch.no_grad()
def own_sample(model: PreTrainedModel, *, num_samples: int = 4, seq_length: int = 24, **options: Any) -> Context:
    """A context of sequences that the model itself writes, so that it is good at them and damage shows."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, VOCAB, (num_samples, 1), generator=generator)
    while tokens.shape[1] <= seq_length:
        probabilities = model(input_ids=tokens, use_cache=False).logits[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
    return make_context(model, tokens.flatten(), num_samples=num_samples, seq_length=seq_length, seed=0, **options)


class ListedMixture(nn.Module):
    """The same function as a fused Mixtral block, with one module an expert and a router that names its choice."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.router = _ListedRouter(fused.gate)
        self.experts = nn.ModuleList(_expert(fused.experts, index) for index in range(fused.experts.num_experts))

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(end_dim=-2)
        weights, chosen = self.router(tokens)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, slots = torch.where(chosen == index)
            if len(rows):
                output.index_add_(0, rows, weights[rows, slots, None] * expert(tokens[rows]))
        return output.view_as(hidden)


class _ListedRouter(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        _, weights, chosen = self.gate(tokens)
        return weights, chosen


class _ListedExpert(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _expert(experts: nn.Module, index: int) -> _ListedExpert:
    gate, up = experts.gate_up_proj[index].detach().chunk(2)
    expert = _ListedExpert(gate.shape[1], gate.shape[0])
    expert.load_state_dict(
        {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": experts.down_proj[index].detach()}
    )
    return expert


def list_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Turn every fused mixture of a Mixtral model into separate modules, in place."""
    for block in model.model.layers:
        block.mlp = ListedMixture(block.mlp).requires_grad_(False)
    return model
