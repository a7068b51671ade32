"""Corrections of Megatron's router: counts in fp32, no noise in evaluation, the load of a whole step.

`global_aux_loss` takes f, the experts' shares of the tokens, over all tokens of an optimizer step. Upstream's f is the
running mean of the micro-batches so far, and its loss is divided by the data-parallel size once too often
(router.py:341-387), so both depend on the layout. Here f comes from outside (`step_load`, see `train/balance.py`).

Source: Megatron-Core 0.16.1 transformer/moe/router.py; Qiu et al., Demons in the Detail (arXiv 2501.11873).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import (
    compute_routing_scores_for_aux_loss,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


def then_centred(finalize: Callable[..., None]) -> Callable[..., None]:
    """A `finalize_model_grads`, which moves the experts' bias, that takes the mean of each layer's bias away after it.

    Source: Ling 2.0 (arXiv 2510.22115).
    """

    @functools.wraps(finalize)
    def run(models: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        finalize(models, *args, **kwargs)
        for model in models:
            for module in model.modules():
                if isinstance(module, TopKRouter) and module.expert_bias is not None:
                    module.expert_bias -= module.expert_bias.mean()

    return run


class StepRouter(TopKRouter):
    """Megatron's top-k router.

    Attributes:
        counted: where forward passes add the tokens that each expert gets by probability alone, [E]; None counts none.
        step_load: f of `global_aux_loss`, shares of all tokens of the step with sum 1, [E]; None takes the shares of
            the micro-batch over all data-parallel ranks, which are the same where it is the step's only one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counted: Tensor | None = None
        self.step_load: Tensor | None = None

    @property
    def balances_steps(self) -> bool:
        """Whether this router trains with `global_aux_loss`."""
        return self.get_aux_loss_coeff("global_aux_loss") > 0

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The parent's choice for logits [S_local, B, E], counted where asked.

        Returns:
            Weights and choice, each [S_local · B, E].
        """
        if self.counted is not None:
            flat = logits.detach().view(-1, logits.shape[-1])
            chosen, _ = compute_routing_scores_for_aux_loss(flat, self.topk, self.score_function)
            self.counted += chosen.sum(dim=0)
        return super().routing(logits, padding_mask)

    def apply_input_jitter(self, input: Tensor) -> Tensor:
        """The parent's noise in training; upstream adds it in evaluation too (router.py:491)."""
        return super().apply_input_jitter(input) if self.training else input

    def _apply_global_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """`probs`, with coefficient · E · Σ_e f_e P_e in its graph, P over this data-parallel rank's micro-batch.

        The mean of P over micro-batches and ranks is P of the step, and the loss is linear in it; collective over
        tensor-, context- and data-parallel ranks where `step_load` is None.

        Args:
            probs: weights of the chosen experts, [tokens, E].
            scores_for_aux_loss: probabilities among all experts, [tokens, E].
            routing_map: the top k of them, bool [tokens, E].
            with_padding_mask: never; no token of ours is padding.
        """
        coefficient = self.get_aux_loss_coeff("global_aux_loss")
        if coefficient == 0:
            return probs
        assert not with_padding_mask
        load = self.step_load
        if load is None:
            counts, _, _ = get_tokens_per_expert_and_token_count(
                routing_map=routing_map, reduce_group=self.tp_dp_cp_group, topk=self.topk
            )
            load = counts / counts.sum()
        local = len(scores_for_aux_loss)
        tokens = local * self.tp_cp_group.size()
        loss = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=load * (self.topk * tokens),
            total_num_tokens=tokens,
            topk=self.topk,
            num_experts=self.num_experts,
            moe_aux_loss_coeff=coefficient,
            fused=self.config.moe_router_fusion,
        )
        return self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss, "global_load_balancing_loss", self.tp_cp_group, valid_token_count=local
        )

    def _maintain_float32_expert_bias(self) -> None:
        """Keep counts in fp32 too: a 16-bit model makes them bf16, which counts to 256 (router.py:211)."""
        super()._maintain_float32_expert_bias()
        counts = self.local_tokens_per_expert
        if counts is not None and counts.dtype != torch.float32:
            counts.data = counts.data.to(torch.float32)
