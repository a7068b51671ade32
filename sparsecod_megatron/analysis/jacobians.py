"""Jacobians of one block per token: exact by rows, estimated from random signs, or averaged as the reference does."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecod_megatron.analysis.isolation import IsolatedBlock
from sparsecod_megatron.hf.calls import Replay, Trace

TOKENS_AT_ONCE = 512
"""Rows of the block's matrix products in one backward pass: below this they are too small to be fast."""


@dataclass(frozen=True)
class TokenJacobians:
    """Numbers of `J = ∂h_{l+1}[t]/∂h_l[t]` for each token; each [b, p], float64.

    With a state of several vectors, h_l is what attention reads and h_{l+1} that with what the block writes added.

    Attributes:
        deviation: ‖J−I‖_F/√d.
        deviation_variance: variance of that estimate; zero where it is exact.
        diagonal_mean: over channels.
        diagonal_std: over channels; None where only estimated, as are the two below.
        off_diagonal: share of ‖J‖²_F outside the diagonal.
        spectral: largest singular value.
    """

    deviation: Tensor
    deviation_variance: Tensor
    diagonal_mean: Tensor
    diagonal_std: Tensor | None = None
    off_diagonal: Tensor | None = None
    spectral: Tensor | None = None


def exact_numbers(apart: IsolatedBlock, rows: Tensor, positions: Tensor) -> TokenJacobians:
    """All numbers, from the whole Jacobian of each token.

    Args:
        apart: the block, checked.
        rows: [b] sequences of the micro-batch.
        positions: [b, p] places of the tokens in each.
    """
    jacobian = token_jacobians(apart, rows, positions)
    size = jacobian.shape[-1]
    diagonal = jacobian.diagonal(dim1=-2, dim2=-1).double()
    squares = (jacobian.double() ** 2).sum(dim=(-2, -1))
    on_diagonal = (diagonal**2).sum(dim=-1)
    # ‖J−I‖² from the difference itself: as ‖J‖² − 2 tr J + d it would lose the digits of a block near the identity.
    deviation = (jacobian - torch.eye(size).to(jacobian)).double().square().sum(dim=(-2, -1)).div(size).sqrt()
    return TokenJacobians(
        deviation,
        torch.zeros_like(deviation),
        diagonal.mean(dim=-1),
        diagonal.std(dim=-1, correction=0),
        (squares - on_diagonal).clamp_min(0) / squares,
        torch.linalg.eigvalsh(jacobian @ jacobian.transpose(-2, -1))[..., -1].clamp_min(0).sqrt().double(),
    )


def token_jacobians(apart: IsolatedBlock, rows: Tensor, positions: Tensor) -> Tensor:
    """[b, p, d, d], row = output channel; float32 or wider."""
    hidden = apart.hidden[rows[:, None], positions]
    size = hidden.shape[-1]
    copies = min(size, max(1, TOKENS_AT_ONCE // positions.numel()))
    tokens, after = _variants(apart, rows, positions, copies)
    jacobian = torch.empty(
        *hidden.shape, size, device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32)
    )
    for start in range(0, size, copies):
        num_rows = min(copies, size - start)
        which = torch.zeros(copies, 1, 1, size, dtype=hidden.dtype, device=hidden.device)
        which[torch.arange(num_rows), 0, 0, start + torch.arange(num_rows)] = 1
        direction = which.expand(copies, *hidden.shape).reshape(tokens.shape)
        (gradient,) = torch.autograd.grad(after, tokens, direction, retain_graph=True)
        jacobian[:, :, start : start + num_rows] = gradient.view(copies, *hidden.shape)[:num_rows].permute(1, 2, 0, 3)
    return jacobian


def estimated_numbers(apart: IsolatedBlock, rows: Tensor, positions: Tensor, signs: Tensor) -> TokenJacobians:
    """Deviation and diagonal mean from random signs `v`: `‖J−I‖²_F = E‖Jᵀv − v‖²` and `tr J = E vᵀJᵀv`.

    Source: M. F. Hutchinson, "A stochastic estimator of the trace of the influence matrix", 1989.

    Args:
        apart: the block, checked.
        rows: [b] sequences of the micro-batch.
        positions: [b, p] places of the tokens in each.
        signs: [probes, b, p, d] ±1, at least two probes.
    """
    hidden = apart.hidden[rows[:, None], positions]
    num_probes, size = len(signs), hidden.shape[-1]
    copies = min(num_probes, max(1, TOKENS_AT_ONCE // positions.numel()))
    tokens, after = _variants(apart, rows, positions, copies)
    squares, traces = [], []
    for start in range(0, num_probes, copies):
        wanted = min(copies, num_probes - start)
        direction = torch.zeros(copies, *hidden.shape).to(hidden)
        direction[:wanted] = signs[start : start + wanted]
        (gradient,) = torch.autograd.grad(after, tokens, direction.view(tokens.shape), retain_graph=True)
        back, forth = gradient.view_as(direction)[:wanted].double(), direction[:wanted].double()
        squares.append(((back - forth) ** 2).sum(dim=-1) / size)
        traces.append((back * forth).sum(dim=-1) / size)
    samples = torch.cat(squares)
    mean = samples.mean(dim=0)
    variance = samples.var(dim=0) / num_probes
    deviation = mean.sqrt()
    # First order: Var(√x) = Var(x) / 4x.
    spread = torch.where(mean > 0, variance / (4 * mean), 0.0)
    return TokenJacobians(deviation, spread, torch.cat(traces).mean(dim=0))


def summed_jacobian(replay: Replay, trace: Trace, layer: int) -> Tensor:
    """The reference's: gradients of each output channel summed over all positions, summed over input tokens.

    Returns:
        [d, d], row = output channel, float64; ÷ tokens it is the reference's E[J].
    """
    layers = replay.layers
    hidden = layers.state.read(layers.blocks[layer], trace.hidden[layer]).detach().requires_grad_()
    after = replay.mapped(trace, layer, hidden)
    size = hidden.shape[-1]
    total = torch.empty(size, size, dtype=torch.float64, device=hidden.device)
    for channel in range(size):
        direction = torch.zeros_like(after)
        direction[..., channel] = 1
        (gradient,) = torch.autograd.grad(after, hidden, direction, retain_graph=True)
        total[channel] = gradient.double().sum(dim=(0, 1))
    return total


def reference_deviation(total: Tensor, num_tokens: int) -> float:
    """‖E[J]−I‖_F/d from `summed_jacobian`s' sum."""
    size = len(total)
    return math.sqrt(((total / num_tokens - torch.eye(size).to(total)) ** 2).sum().item()) / size


def _variants(apart: IsolatedBlock, rows: Tensor, positions: Tensor, copies: int) -> tuple[Tensor, Tensor]:
    """`copies` of the tokens as one input [copies · b, p, d] that takes gradients, and the block's output."""
    hidden = apart.hidden[rows[:, None], positions].detach()
    tokens = hidden.repeat(copies, 1, 1).requires_grad_()
    return tokens, apart(tokens, rows, positions)
