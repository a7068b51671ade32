"""AdamW with the state layout of Transformer Engine's FusedAdam, and the two checks for CUDA tensors around it.

The distributed optimizer checkpoints `exp_avg`, `exp_avg_sq` and one step count in the parameter group. torch's AdamW
keeps a step tensor per parameter instead, which Megatron-Core 0.16.1 restores wrongly without any error: the resumed
loss differs (distrib_optimizer.py:642, 820, 940).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer import distrib_optimizer
from megatron.core.optimizer import optimizer as optimizer_module

from sparsecod_megatron.backend.cpu.redirection import Redirection

logger = logging.getLogger("sparsecod")


class FusedAdam(torch.optim.Optimizer):
    """AdamW through torch's fused CPU kernel; its step count lives in `param_group["step"]`.

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
            logger.warning("the CPU's AdamW does not know what Megatron-Core asks of it: %s; left out", asked)
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
        self.kernel(
            params,
            grads,
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [torch.tensor(float(group["step"])) for _ in params],
            amsgrad=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


@torch.no_grad()
def clip_grad_by_total_norm(
    parameters: list[torch.nn.Parameter], max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """Scale all gradients in place by max_norm / total_norm if that is below one. Local: the norm is global already."""
    coefficient = max_norm / (total_norm + 1.0e-6)
    grads = [param.grad for param in parameters if param.grad is not None]
    if coefficient < 1.0 and grads:
        torch._foreach_mul_(grads, coefficient)


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Makes `tensor.type()` say torch.cuda.*, by which Megatron sorts parameters into fp32 and 16-bit ones."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.")

    torch.Tensor.type = type_name  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.type = original  # type: ignore[method-assign]


def _under_cuda_type_names(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        with _cuda_type_names():
            init(self, *args, **kwargs)

    return wrapped


def redirections() -> list[Redirection]:
    """Redirections of Megatron-Core's optimizer package."""
    layout = "torch's AdamW resumes wrongly under the distributed optimizer"
    table: list[tuple[Any, str, Any, str, str]] = [
        (megatron_optimizer, "Adam", FusedAdam, "optimizer/__init__.py:326", layout),
        (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False, "optimizer/__init__.py:318", layout),
        (distrib_optimizer, "Adam", FusedAdam, "optimizer/distrib_optimizer.py:505", layout),
        (distrib_optimizer, "HAVE_APEX_OR_TE", True, "optimizer/distrib_optimizer.py:640/820", layout),
        (distrib_optimizer, "USING_TE_OPTIMIZER", True, "optimizer/distrib_optimizer.py:655", layout),
        (
            distrib_optimizer.DistributedOptimizer,
            "__init__",
            _under_cuda_type_names(distrib_optimizer.DistributedOptimizer.__init__),
            "optimizer/distrib_optimizer.py:361/420/582",
            "compares type names with torch.cuda.*",
        ),
        (
            optimizer_module.Float16OptimizerWithFloat16Params,
            "__init__",
            _under_cuda_type_names(optimizer_module.Float16OptimizerWithFloat16Params.__init__),
            "optimizer/optimizer.py:671/690",
            "compares type names with torch.cuda.*",
        ),
        (
            optimizer_module,
            "clip_grad_by_total_norm_fp32",
            clip_grad_by_total_norm,
            "optimizer/clip_grads.py:167",
            "asserts the type name torch.cuda.FloatTensor",
        ),
    ]
    return [Redirection(*row) for row in table]
