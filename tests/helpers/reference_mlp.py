"""MLPs and mixtures of experts written down from their definitions, token by token, for `reference_gpt.py`."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsecod_megatron.config import ModelConfig

ACTIVATIONS = {
    "swiglu": lambda x: x * torch.sigmoid(x),
    "geglu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "clamped_swiglu": lambda x: x * torch.sigmoid(1.702 * x),
    "geglu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
}


def dense(model: ModelConfig, weights: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    """down(act(gate(x)) · up(x)), or down(act(up(x))), with biases if there are."""
    act, inner = ACTIVATIONS[model.activation], linear(weights, f"{at}.linear_fc1", x)
    if model.activation == "clamped_swiglu":
        limit, width = model.activation_func_clamp_value, inner.shape[-1] // 2
        gate, up = inner[..., :width].clamp(max=limit), inner[..., width:].clamp(-limit, limit)
        return linear(weights, f"{at}.linear_fc2", act(gate) * (up + 1))
    if model.activation in ("swiglu", "geglu", "geglu_tanh"):
        width = inner.shape[-1] // 2
        return linear(weights, f"{at}.linear_fc2", act(inner[..., :width]) * inner[..., width:])
    return linear(weights, f"{at}.linear_fc2", act(inner))


def linear(weights: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    """x Wᵀ + b, the bias if there is one."""
    bias = weights.get(f"{at}.bias")
    product = x @ weights[f"{at}.weight"].T
    return product if bias is None else product + bias


def mixture(model: ModelConfig, weights: Mapping[str, Tensor], at: str, x: Tensor, *, layer: int) -> Tensor:
    """Σ weight · expert(token) over the chosen experts, tokens visited one by one, plus the shared expert."""
    # Megatron holds the sequence first, which decides who comes first where scores tie.
    flat = x.transpose(0, 1).reshape(-1, x.shape[-1])
    bias = weights.get(f"{at}.router.expert_bias")
    logits = linear(weights, f"{at}.router", flat)
    chosen = [_choose(model, row, model.topk(layer), bias) for row in logits]
    _drop(model, chosen, model.topk(layer))
    outputs = []
    for token, experts in zip(flat, chosen, strict=True):
        output = torch.zeros_like(token)
        for expert, weight in experts.items():
            output = output + weight * dense(model, weights, f"{at}.experts.local_experts.{expert}", token)
        outputs.append(output)
    routed = torch.stack(outputs).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)
    if model.moe_shared_expert_intermediate_size is None:
        return routed
    shared = dense(model, weights, f"{at}.shared_experts", x)
    if model.moe_shared_expert_gate:
        shared = shared * torch.sigmoid(x @ weights[f"{at}.shared_experts.gate_weight"].T)
    return routed + shared


def _choose(model: ModelConfig, logits: Tensor, topk: int, bias: Tensor | None) -> dict[int, Tensor]:
    """Expert to weight of one token."""
    sigmoid = model.moe_router_score_function == "sigmoid"
    scores = torch.sigmoid(logits) if sigmoid else (logits.softmax(-1) if model.moe_router_pre_softmax else logits)
    ranking = scores if bias is None else scores + bias
    allowed = set(range(len(logits)))
    if model.moe_router_num_groups is not None:
        assert model.moe_router_group_topk is not None
        groups = ranking.view(model.moe_router_num_groups, -1)
        best = groups.topk(topk // model.moe_router_group_topk, dim=1).values.sum(1)
        kept = best.argsort(descending=True)[: model.moe_router_group_topk].tolist()
        allowed = {group * groups.shape[1] + place for group in kept for place in range(groups.shape[1])}
    experts = [expert for expert in ranking.argsort(descending=True).tolist() if expert in allowed][:topk]
    weights = scores[experts]
    if sigmoid and topk > 1:
        weights = weights / (weights.sum() + 1e-20)
    if not sigmoid and not model.moe_router_pre_softmax:
        weights = weights.softmax(-1)
    factor = model.moe_router_topk_scaling_factor or 1.0
    return {expert: weight * factor for expert, weight in zip(experts, weights, strict=True)}


def _drop(model: ModelConfig, chosen: list[dict[int, Tensor]], topk: int) -> None:
    """Take the least probable tokens from experts above their capacity."""
    if model.moe_expert_capacity_factor is None:
        return
    experts = model.num_moe_experts or 0
    capacity = math.ceil(len(chosen) * topk / experts * model.moe_expert_capacity_factor)
    for expert in range(experts):
        takers = [weights for weights in chosen if expert in weights]
        takers.sort(key=lambda weights, expert=expert: float(weights[expert]), reverse=True)  # type: ignore[misc]
        for weights in takers[capacity:]:
            del weights[expert]


def router_losses(model: ModelConfig, weights: Mapping[str, Tensor], inputs: Mapping[int, Tensor]) -> Tensor:
    """Auxiliary and z-loss of all layers, with their coefficients.

    Args:
        model: the variant.
        weights: as for `mixture`.
        inputs: what each layer's router reads, by layer, `[batch, seq, hidden]`.
    """
    total = torch.zeros(())
    for layer, x in inputs.items():
        logits = x @ weights[f"decoder.layers.{layer}.mlp.router.weight"].T
        total = total + model.moe_z_loss_coeff * torch.logsumexp(logits, dim=-1).square().mean()
        kind = model.moe_router_load_balancing_type
        if kind == "none":
            continue
        scores = torch.sigmoid(logits) if model.moe_router_score_function == "sigmoid" else logits.softmax(-1)
        scores = scores / scores.sum(-1, keepdim=True)
        sequences = scores if kind == "seq_aux_loss" else scores.flatten(end_dim=1)[None]
        losses = [_balance(sequence, model.topk(layer)) for sequence in sequences]
        total = total + model.moe_aux_loss_coeff * torch.stack(losses).mean()
    return total


def _balance(scores: Tensor, topk: int) -> Tensor:
    """E · Σ_i (share of routed slots of expert i) · (mean score of expert i), of `[tokens, experts]`.

    Source: Fedus et al., Switch Transformers (arXiv 2101.03961), equation 4, with k slots a token.
    """
    experts = scores.shape[1]
    counts = F.one_hot(scores.topk(topk, dim=-1).indices, experts).sum((0, 1))
    return experts * (counts / counts.sum() * scores.mean(0)).sum()
