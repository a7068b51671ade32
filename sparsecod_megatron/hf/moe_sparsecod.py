"""MLPs, routers and mixtures of experts of the `sparsecod` architecture.

Copied as it is into an export, so it imports nothing of this package but its neighbours. One expert is one module with
matrices of its own, under the names that Qwen's mixtures have in files.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_sparsecod import SparsecodConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "clamped_swiglu": lambda x: x * torch.sigmoid(1.702 * x),
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
ACTIVATIONS_WITH_GATE = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")


class SparsecodMLP(nn.Module):
    """down(act(gate(x)) · up(x)), or down(act(up(x))) for activations without gate.

    `clamped_swiglu` limits the gate from above and up(x) on both sides, and multiplies by up(x) + 1.

    Args:
        config: configuration of the model.
        width: inner channels.
    """

    def __init__(self, config: SparsecodConfig, width: int) -> None:
        super().__init__()
        self.act, hidden, bias = ACTIVATIONS[config.activation], config.hidden_size, config.mlp_bias
        self.limit = config.activation_func_clamp_value if config.activation == "clamped_swiglu" else None
        has_gate = config.activation in ACTIVATIONS_WITH_GATE
        self.gate_proj = nn.Linear(hidden, width, bias=bias) if has_gate else None
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., hidden]."""
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        gate, up = self.gate_proj(x), self.up_proj(x)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit) + 1
        return self.down_proj(self.act(gate) * up)


class SparsecodRouter(nn.Module):
    """Which experts a token uses, and with what weights.

    Softmax over the chosen logits, or over all of them without renormalising (`moe_router_pre_softmax`); or sigmoid
    scores over their sum. A bias and limits to groups of experts touch the choice alone.

    Source: `topk_routing_with_score_function` in megatron/core/transformer/moe/moe_utils.py.
    """

    def __init__(self, config: SparsecodConfig, layer: int) -> None:
        super().__init__()
        self.config, self.topk = config, config.topk(layer)
        self.dtype = torch.float64 if config.moe_router_dtype == "fp64" else torch.float32
        experts = config.num_moe_experts or 0
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)
        self.bias = nn.Parameter(torch.zeros(experts)) if config.mlp_bias else None
        self.expert_bias = nn.Parameter(torch.zeros(experts)) if config.moe_router_enable_expert_bias else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, hidden] → weights and experts, both [tokens, topk]."""
        logits = self.logits(x)
        sigmoid = self.config.moe_router_score_function == "sigmoid"
        scores = torch.sigmoid(logits) if sigmoid else logits
        if self.config.moe_router_pre_softmax:
            scores = logits.softmax(dim=-1)
        ranking = scores if self.expert_bias is None else scores + self.expert_bias.to(self.dtype)
        experts = self._within_groups(ranking).topk(self.topk, dim=-1).indices
        weights = scores.gather(-1, experts)
        if sigmoid and self.topk > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if not sigmoid and not self.config.moe_router_pre_softmax:
            weights = weights.softmax(dim=-1)
        return (weights * (self.config.moe_router_topk_scaling_factor or 1.0)).to(x.dtype), experts

    def logits(self, x: Tensor) -> Tensor:
        """[..., hidden] → [..., experts]; a mechanism may put its own in place of it."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return F.linear(x.to(self.dtype), self.weight.to(self.dtype), bias)

    def _within_groups(self, ranking: Tensor) -> Tensor:
        """Experts outside a token's best groups at -inf; [tokens, experts]."""
        groups, kept = self.config.moe_router_num_groups, self.config.moe_router_group_topk
        if groups is None or kept is None:
            return ranking
        grouped = ranking.unflatten(-1, (groups, -1))
        best = grouped.topk(self.topk // kept, dim=-1).values.sum(dim=-1).topk(kept, dim=-1).indices
        allowed = torch.zeros(grouped.shape[:-1], dtype=torch.bool, device=ranking.device).scatter(-1, best, True)
        return grouped.masked_fill(~allowed.unsqueeze(-1), float("-inf")).flatten(-2)


class SparsecodMoE(nn.Module):
    """Σ weight · expert(x) over the chosen experts, plus the shared expert."""

    def __init__(self, config: SparsecodConfig, layer: int) -> None:
        super().__init__()
        width = config.moe_ffn_hidden_size
        shared = config.moe_shared_expert_intermediate_size
        self.gate = SparsecodRouter(config, layer)
        self.experts = nn.ModuleList(SparsecodMLP(config, width) for _ in range(config.num_moe_experts or 0))
        self.shared_expert = None if shared is None else SparsecodMLP(config, shared)
        gated = config.moe_shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, seq, hidden] → [batch, seq, hidden]."""
        tokens = x.flatten(end_dim=-2)
        weights, chosen = self.gate(tokens)
        output = torch.zeros_like(tokens)
        for index in chosen.unique().tolist():
            rows, slots = torch.where(chosen == index)
            output.index_add_(0, rows, weights[rows, slots, None] * self.experts[index](tokens[rows]))
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = shared * torch.sigmoid(self.shared_expert_gate(tokens))
            output = output + shared
        return output.view_as(x)
