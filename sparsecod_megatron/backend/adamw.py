"""AdamW with the state layout of Transformer Engine's FusedAdam, where neither that package nor apex is installed.

The distributed optimizer checkpoints `exp_avg`, `exp_avg_sq` and one step count in the parameter group. torch's AdamW
keeps a step tensor per parameter instead, which Megatron-Core 0.16.1 restores wrongly without any error: the resumed
loss differs (distrib_optimizer.py:642, 820, 940).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer

from sparsecod_megatron.backend.redirection import Redirection

logger = logging.getLogger("sparsecod")


class FusedAdam(torch.optim.Optimizer):
    """AdamW through torch's fused kernel of the device; its step count lives in `param_group["step"]`.

    Args:
        params: parameters or groups; parameters and gradients in fp32.
        lr: learning rate.
        weight_decay: decoupled decay, or L2 regularisation without `adam_w_mode`.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        adam_w_mode: decoupled weight decay.
        unknown: what a later Megatron-Core passes besides; logged unless switched off, because it has no effect here.

    Source: transformer_engine.pytorch.optimizers.FusedAdam (arguments and state layout).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        **unknown: Any,
    ) -> None:
        if asked := {name: value for name, value in unknown.items() if value not in (None, False)}:
            logger.warning("torch's AdamW kernel does not support what Megatron-Core asks of it: %s; left out", asked)
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.kernel = torch._fused_adamw_ if adam_w_mode else torch._fused_adam_

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "Megatron never passes a closure"
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            pairs = [(param, param.grad) for param in group["params"] if param.grad is not None]
            if pairs:
                self._step_group(group, *map(list, zip(*pairs, strict=True)))

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor], grads: list[torch.Tensor]) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param] = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
        beta1, beta2 = group["betas"]
        # The kernel only reads it, on its own device; `tensor` would wait for a copy from the host.
        step = torch.full((), float(group["step"]), device=params[0].device)
        self.kernel(
            params,
            grads,
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [step] * len(params),
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def redirections() -> list[Redirection]:
    """Redirections of Megatron-Core's AdamW; none where it has Transformer Engine's or apex's."""
    if distrib_optimizer.HAVE_APEX_OR_TE:
        return []
    layout = "torch's AdamW resumes wrongly under the distributed optimizer"
    table: list[tuple[Any, str, Any, str, str]] = [
        (megatron_optimizer, "Adam", FusedAdam, "optimizer/__init__.py:326", layout),
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False, "optimizer/__init__.py:318", layout),
        (distrib_optimizer, "Adam", FusedAdam, "optimizer/distrib_optimizer.py:505", layout),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True, "optimizer/distrib_optimizer.py:640/820", layout),
        (distrib_optimizer, "USING_TE_OPTIMIZER", True, "optimizer/distrib_optimizer.py:655", layout),
    ]
    return [Redirection(*row) for row in table]
