"""Muon's arithmetic where NVIDIA's Emerging-Optimizers, from which Megatron-Core takes it, is not installed.

The package is on no package index, and not in NGC's PyTorch image either. Three names stand in for it on any device,
with the same signatures, coefficients and order of operations; where it is there, nothing is redirected.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import muon
from torch import Tensor

from sparsecod_megatron.backend.redirection import Redirection

COEFFICIENTS = {
    "simple": ((3.4445, -4.7750, 2.0315),),
    "quintic": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""(a, b, c) of each iteration X ← aX + b(XXᵀ)X + c(XXᵀ)²X, in turn. Megatron-Core uses `quintic`.

Sources: Jordan et al., Muon (2024) for `simple`; Cesista et al., Squeezing 1-2 % Efficiency Gains Out of Muon (2025).
"""
_MIN_NORM = 1e-7


def newton_schulz_tp(
    x: Tensor,
    steps: int,
    coefficient_type: str,
    tp_group: dist.ProcessGroup | None,
    partition_dim: int | None = None,
    mode: str = "duplicated",
) -> Tensor:
    """The matrix with the singular vectors of `x` and singular values near 1. Collective over `tp_group` if sharded.

    Runs in bf16 when torch's precision of fp32 matrix products is `medium`, else in fp32.

    Args:
        x: this rank's shard, [out, in], fp32.
        steps: iterations, a multiple of the number of coefficients.
        coefficient_type: a key of COEFFICIENTS.
        tp_group: ranks that hold the other shards.
        partition_dim: dimension that is sharded; None for a whole matrix.
        mode: `duplicated` gathers the shards on every rank; `distributed` reduces the Gram matrices.

    Returns:
        Like `x`.

    Source: emerging_optimizers.orthogonalized_optimizers.muon_utils (arguments and order of operations).
    """
    coefficients = COEFFICIENTS[coefficient_type]
    assert steps % len(coefficients) == 0, f"{steps} steps do not go through {len(coefficients)} coefficients evenly"
    chosen = list(islice(cycle(coefficients), steps))
    if partition_dim is None:
        return _iterate(x, chosen, transpose=x.shape[0] > x.shape[1])
    assert tp_group is not None
    if mode == "distributed":
        # The sharded dimension is summed over in the Gram matrix.
        return _iterate(x, chosen, transpose=partition_dim == 0, group=tp_group)
    assert mode == "duplicated", mode
    shards = [torch.empty_like(x) for _ in range(tp_group.size())]
    dist.all_gather(shards, x.contiguous(), group=tp_group)
    whole = torch.cat(shards, dim=partition_dim)
    orthogonal = _iterate(whole, chosen, transpose=whole.shape[0] > whole.shape[1])
    return orthogonal.chunk(tp_group.size(), dim=partition_dim)[tp_group.rank()]


def _iterate(
    x: Tensor,
    coefficients: list[tuple[float, float, float]],
    *,
    transpose: bool,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Newton-Schulz on rows (columns if `transpose`), which are whole on every rank of `group`."""
    matrix = x.T if transpose else x
    squares = matrix.square().sum()
    if group is not None:
        dist.all_reduce(squares, group=group)
    matrix = matrix / squares.sqrt().clamp_min(_MIN_NORM)
    if torch.get_float32_matmul_precision() == "medium":
        matrix = matrix.bfloat16()
    for a, b, c in coefficients:
        gram = matrix @ matrix.T
        if group is not None:
            dist.all_reduce(gram, group=group)
        matrix = torch.addmm(matrix, torch.addmm(gram, gram, gram, beta=b, alpha=c), matrix, beta=a)
    return (matrix.T if transpose else matrix).float()


def get_muon_scale_factor(size_out: int, size_in: int, mode: str = "spectral") -> float:
    """Factor on an orthogonal update of a whole [size_out, size_in] matrix.

    Args:
        size_out: rows.
        size_in: columns.
        mode: `spectral` (arXiv 2502.16982), `unit_rms_norm` (arXiv 2502.07529), `shape_scaling` (Jordan et al., 2024).
    """
    ratio = size_out / size_in
    squared = {"spectral": max(size_out, size_in), "unit_rms_norm": ratio, "shape_scaling": max(1, ratio)}
    return math.sqrt(squared[mode])


class OrthogonalizedOptimizer(torch.optim.Optimizer):
    """Momentum, orthogonalised, with decoupled weight decay; `momentum_buffer` is its only state.

    Args:
        params: matrices or groups of them, fp32.
        lr: learning rate.
        momentum_beta: decay rate of the mean gradient.
        weight_decay: times lr, of the weights.
        use_nesterov: step along the mean of this gradient and the momentum.
        weight_decay_method: must be `decoupled`, the one Megatron-Core asks for.
        fp32_matmul_prec: torch's precision of fp32 matrix products meanwhile; `medium` is bf16.
        scaled_orthogonalize_fn: what the subclass's `orthogonalize` calls.

    Source: emerging_optimizers.orthogonalized_optimizers.OrthogonalizedOptimizer (arguments and state layout).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum_beta: float,
        weight_decay: float,
        *,
        use_nesterov: bool,
        weight_decay_method: str,
        fp32_matmul_prec: str,
        scaled_orthogonalize_fn: Callable[..., Tensor],
    ) -> None:
        assert weight_decay_method == "decoupled", weight_decay_method
        defaults = {
            "lr": lr,
            "momentum_beta": momentum_beta,
            "use_nesterov": use_nesterov,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.fp32_matmul_prec = fp32_matmul_prec
        self.scaled_orthogonalize_fn = scaled_orthogonalize_fn

    def orthogonalize(self, p: Tensor, grad: Tensor, **group: Any) -> Tensor:
        """The update that `p` takes for its momentum `grad`; Megatron-Core's subclass shards and splits here."""
        return self.scaled_orthogonalize_fn(grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient. Collective over tensor-parallel ranks."""
        assert closure is None, "Megatron never passes a closure"
        with _matmul_precision(self.fp32_matmul_prec):
            for group in self.param_groups:
                settings = {name: value for name, value in group.items() if name != "params"}
                for param in group["params"]:
                    if param.grad is not None:
                        self._update(param, settings)

    def _update(self, param: Tensor, settings: dict[str, Any]) -> None:
        assert param.grad is not None
        state, beta = self.state[param], settings["momentum_beta"]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        momentum = state["momentum_buffer"].lerp_(param.grad, 1 - beta)
        direction = param.grad.lerp(momentum, beta) if settings["use_nesterov"] else momentum
        param.mul_(1 - settings["lr"] * settings["weight_decay"])
        param.add_(self.orthogonalize(param, direction, **settings), alpha=-settings["lr"])


@contextlib.contextmanager
def _matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class TensorParallelMuon(muon.TensorParallelMuon, OrthogonalizedOptimizer):
    """Megatron-Core's Muon, whose base class is `object` where the package is missing, on the base class above."""


def redirections() -> list[Redirection]:
    """Redirections of Megatron-Core's Muon; none where the package is installed."""
    if muon.HAVE_EMERGING_OPTIMIZERS:
        return []
    reason = "emerging_optimizers is not on the package index"
    return [
        Redirection(muon, "HAVE_EMERGING_OPTIMIZERS", True, "optimizer/muon.py:33", reason),
        Redirection(muon, "TensorParallelMuon", TensorParallelMuon, "optimizer/muon.py:42", reason),
        Redirection(muon, "newton_schulz_tp", newton_schulz_tp, "optimizer/muon.py:81", reason, absent=True),
        Redirection(muon, "get_muon_scale_factor", get_muon_scale_factor, "optimizer/muon.py:89", reason, absent=True),
    ]
