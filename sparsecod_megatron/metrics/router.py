"""What every router of a mixture of experts does: how it spreads the tokens, how sure it is, and its losses.

Definitions, over all tokens of the global batch, E experts, top-k slots a token:

    tokens_per_expert   slots that the router gives each expert, before any capacity limit
    load_entropy        entropy of the shares of slots, over log E: 1 is balanced, 0 is one expert
    load_max_over_mean  slots of the fullest expert over the mean
    dropped_frac        share of slots that a capacity limit drops
    mean_topk_prob      mean over slots of the probability, among all E, of the expert chosen
    aux_loss            mean over micro-batches of E · Σ_e f_e · P_e, with f_e the share of the micro-batch's slots and
                        P_e its mean probability: Switch Transformer's balancing loss, before its coefficient
    z_loss              mean over tokens of (log Σ_e exp logit_e)²

Probabilities are the softmax over all experts (or the sigmoids over their sum, where the router scores with them),
whether or not the weights are then renormalised over the chosen: renormalised weights have the mean 1/k whatever the
router does. `aux_loss` takes the top-k of these probabilities, without expert groups or bias, as Megatron-Core trains
it; it is reported also where a run trains another balancing loss or none.

f · P is not linear in the tokens, and a micro-batch spans the tensor- and context-parallel ranks; so its counts and
probabilities are first summed over these, for all layers and micro-batches in one small reduction when the step ends.
Everything else is plain sums over tokens. The logits are computed again from the router's input, E · H multiplications
a token; input jitter and forced balancing are not in them. Dense layers give nothing.

Source: Megatron-Core transformer/moe/router.py and moe_utils.py; Fedus et al. (arXiv 2101.03961); Zoph et al. (arXiv
2202.08906).
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from sparsecod_megatron.metrics.accumulator import LayerAccumulator
from sparsecod_megatron.metrics.group import Statistics
from sparsecod_megatron.metrics.hooks import in_backward
from sparsecod_megatron.parallel import all_reduce_sums


class RouterGroup:
    """tokens_per_expert, load_entropy, load_max_over_mean, dropped_frac, mean_topk_prob, aux_loss, z_loss.

    Args:
        models: the GPTModel chunks of this rank, without wrappers.
    """

    maxima: tuple[str, ...] = ()

    def __init__(self, models: Sequence[GPTModel]) -> None:
        layers = [layer for model in models for layer in model.decoder.layers]
        self._routers = {
            layer.layer_number - 1: layer.mlp.router for layer in layers if isinstance(layer.mlp, MoELayer)
        }
        self._experts = tuple(f"router_tokens_{expert}" for expert in range(models[0].config.num_moe_experts or 0))
        means = ("router_kept", "router_topk_prob", "router_aux_loss", "router_z_loss") if self._experts else ()
        self.names: tuple[str, ...] = self._experts + means

    @contextlib.contextmanager
    def collecting(self, sums: LayerAccumulator) -> Iterator[None]:
        """Observe every training forward pass inside the block. Collective over tensor × context parallel ranks."""
        loads: dict[int, list[Tensor]] = defaultdict(list)

        def observer(layer: int) -> Any:
            @torch.no_grad()
            def observe(router: TopKRouter, args: tuple[Tensor, ...], result: tuple[Tensor, Tensor]) -> None:
                if not in_backward():
                    loads[layer].append(_observe(sums, layer, router, args[0], result[1]))

            return observe

        handles = [router.register_forward_hook(observer(layer)) for layer, router in self._routers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if loads:
            self._add_loads(sums, loads)

    def statistics(self, means: dict[str, float]) -> Statistics:
        """One layer's statistics; none if its MLP is dense."""
        if "router_z_loss" not in means:
            return {}
        tokens = [means[name] for name in self._experts]
        shares = [count / sum(tokens) for count in tokens]
        entropy = -sum(share * math.log(share) for share in shares if share > 0)
        return {
            "tokens_per_expert": tokens,
            "load_entropy": entropy / math.log(len(tokens)) if len(tokens) > 1 else 1.0,
            "load_max_over_mean": max(shares) * len(shares),
            "dropped_frac": 1.0 - means["router_kept"],
            "mean_topk_prob": means["router_topk_prob"],
            "aux_loss": means["router_aux_loss"],
            "z_loss": means["router_z_loss"],
        }

    def _add_loads(self, sums: LayerAccumulator, loads: dict[int, list[Tensor]]) -> None:
        """Add what needs whole micro-batches or plain sums; `loads` by layer, one [3, E] a micro-batch."""
        stacked = torch.stack([torch.stack(loads[layer]) for layer in self._routers]).double()
        routed, switch = stacked[:, :, 0].sum(dim=1), stacked[:, :, 1:].contiguous()
        router = next(iter(self._routers.values()))
        topk = torch.tensor([[[each.topk]] for each in self._routers.values()], device=stacked.device)
        if router.tp_cp_group.size() > 1:
            all_reduce_sums(switch, router.tp_cp_group)
        slots, probabilities = switch.unbind(dim=2)  # [layers, micro-batches, E] each
        tokens = slots.sum(dim=-1, keepdim=True) / topk
        fractions, mean_probabilities = slots / (tokens * topk), probabilities / tokens
        losses = len(self._experts) * (fractions * mean_probabilities).sum(dim=-1)
        # A plain sum: one process of the pipeline stage adds the count 1, the others 0.
        count = 1 if router.tp_dp_cp_group.rank() == 0 else 0
        for layer, counts, layer_losses in zip(self._routers, routed, losses, strict=True):
            sums.add(layer, "router_aux_loss", layer_losses.sum(), len(layer_losses))
            sums.add_many(layer, self._experts, counts, count)


def _observe(sums: LayerAccumulator, layer: int, router: TopKRouter, x: Tensor, routing_map: Tensor) -> Tensor:
    """Add what is a sum over tokens and return what is not.

    Args:
        sums: where to add.
        layer: 0-based index in the whole model.
        router: the layer's.
        x: its input, [S_local, B, H].
        routing_map: its choice after any capacity limit, bool [tokens, E].

    Returns:
        By expert, [3, E]: slots given, slots by top-k probability alone, and Σ over tokens of the probability.
    """
    config = router.config
    logits = router.gating(x).view(-1, config.num_moe_experts).float()
    top, probabilities = compute_routing_scores_for_aux_loss(logits, router.topk, router.score_function)
    chosen = routing_map if config.moe_expert_capacity_factor is None else _choice(router, logits)
    # Padding to capacity routes tokens that did not choose the expert, with weight 0.
    kept = chosen & routing_map
    tokens = len(logits)
    sums.add(layer, "router_kept", kept.sum(), tokens * router.topk)
    sums.add(layer, "router_topk_prob", (probabilities * chosen).sum(), tokens * router.topk)
    sums.add(layer, "router_z_loss", torch.logsumexp(logits, dim=-1).square().sum(), tokens)
    return torch.stack((chosen.sum(dim=0), top.sum(dim=0), probabilities.sum(dim=0)))


def _choice(router: TopKRouter, logits: Tensor) -> Tensor:
    """The router's choice before its capacity limit, bool [tokens, E]."""
    config = router.config
    _, routing_map = topk_routing_with_score_function(
        logits,
        router.topk,
        use_pre_softmax=config.moe_router_pre_softmax,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
        scaling_factor=config.moe_router_topk_scaling_factor,
        score_function=router.score_function,
        expert_bias=router.expert_bias,
    )
    return routing_map
