"""A GPT forward pass written down from the definitions, on tensors under Megatron-Core's names.

It shares nothing with the code under test: rows of the fused matrices are picked by index, the rotation is a complex
multiplication, experts are visited token by token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.config import ModelConfig


def random_tensors(model: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Every parameter of a Megatron GPTModel (local spec), random, norms included."""
    generator = torch.Generator().manual_seed(seed)
    hidden, heads, head_dim, groups = model.hidden_size, model.num_attention_heads, model.head_dim, model.query_groups

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def norm() -> Tensor:
        return 1 + 0.3 * torch.randn(hidden, generator=generator)

    tensors = {"embedding.word_embeddings.weight": matrix(model.vocab_size or 0, hidden) * math.sqrt(hidden)}
    for layer in range(model.num_layers):
        at = f"decoder.layers.{layer}"
        tensors[f"{at}.input_layernorm.weight"] = norm()
        tensors[f"{at}.self_attention.linear_qkv.weight"] = matrix((heads + 2 * groups) * head_dim, hidden)
        tensors[f"{at}.self_attention.linear_proj.weight"] = matrix(hidden, heads * head_dim)
        tensors[f"{at}.pre_mlp_layernorm.weight"] = norm()
        mlps = {f"{at}.mlp": model.ffn_hidden_size}
        if model.num_moe_experts is not None:
            tensors[f"{at}.mlp.router.weight"] = matrix(model.num_moe_experts, hidden)
            mlps = {
                f"{at}.mlp.experts.local_experts.{expert}": model.expert_ffn_hidden_size
                for expert in range(model.num_moe_experts)
            }
            if model.moe_shared_expert_intermediate_size is not None:
                mlps[f"{at}.mlp.shared_experts"] = model.moe_shared_expert_intermediate_size
        for name, width in mlps.items():
            tensors[f"{name}.linear_fc1.weight"] = matrix(2 * width, hidden)
            tensors[f"{name}.linear_fc2.weight"] = matrix(hidden, width)
    tensors["decoder.final_layernorm.weight"] = norm()
    if model.untie_embeddings_and_output_weights:
        tensors["output_layer.weight"] = matrix(model.vocab_size or 0, hidden)
    return tensors


def forward(model: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits `[batch, seq, vocab]` and each block's output `[batch, seq, hidden]`."""
    x, blocks = weights["embedding.word_embeddings.weight"][tokens], []
    for layer in range(model.num_layers):
        at = f"decoder.layers.{layer}"
        x = x + _attention(model, weights, at, _rms_norm(x, weights[f"{at}.input_layernorm.weight"], model))
        normed = _rms_norm(x, weights[f"{at}.pre_mlp_layernorm.weight"], model)
        mlp = _experts if model.is_moe else _dense
        x = x + mlp(model, weights, f"{at}.mlp", normed)
        blocks.append(x)
    tied = "embedding.word_embeddings.weight"
    output = weights["output_layer.weight" if model.untie_embeddings_and_output_weights else tied]
    return _rms_norm(x, weights["decoder.final_layernorm.weight"], model) @ output.T, blocks


def _rms_norm(x: Tensor, weight: Tensor, model: ModelConfig) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + model.layernorm_epsilon).sqrt()


def _rotate(x: Tensor, base: float) -> Tensor:
    """`[batch, seq, head_dim]`, channel i and i + head_dim/2 as one complex number."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[1]), base ** (-torch.arange(half) / half))
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


def _attention(model: ModelConfig, weights: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    size, per_group = model.head_dim, model.num_attention_heads // model.query_groups
    projected = x @ weights[f"{at}.self_attention.linear_qkv.weight"].T
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    outputs = []
    for head in range(model.num_attention_heads):
        first = (head // per_group) * (per_group + 2)
        query, key, value = (
            projected[..., slot * size : (slot + 1) * size]
            for slot in (first + head % per_group, first + per_group, first + per_group + 1)
        )
        query, key = _rotate(query, model.rotary_base), _rotate(key, model.rotary_base)
        outputs.append((query @ key.transpose(1, 2) / math.sqrt(size) + mask).softmax(-1) @ value)
    return torch.cat(outputs, dim=-1) @ weights[f"{at}.self_attention.linear_proj.weight"].T


def _dense(model: ModelConfig, weights: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    joined, down = weights[f"{at}.linear_fc1.weight"], weights[f"{at}.linear_fc2.weight"]
    width = joined.shape[0] // 2
    return (F.silu(x @ joined[:width].T) * (x @ joined[width:].T)) @ down.T


def _experts(model: ModelConfig, weights: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    logits = x @ weights[f"{at}.router.weight"].T
    output = torch.zeros_like(x)
    for b, s in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        chosen = logits[b, s].argsort(descending=True)[: model.moe_router_topk]
        scores = logits[b, s].softmax(-1)[chosen] if model.moe_router_pre_softmax else logits[b, s][chosen].softmax(-1)
        for score, expert in zip(scores, chosen.tolist(), strict=True):
            output[b, s] += score * _dense(model, weights, f"{at}.experts.local_experts.{expert}", x[b, s])
    if model.moe_shared_expert_intermediate_size is not None:
        output = output + _dense(model, weights, f"{at}.shared_experts", x)
    return output
