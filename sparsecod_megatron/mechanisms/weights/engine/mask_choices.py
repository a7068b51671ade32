"""The six 2:4 masks of four weights, a soft choice among them, and numbers that belong to a group's place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecod_megatron.mechanisms.weights.engine.selection import hashed

GROUP = 4
MASKS = ((1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 1), (0, 1, 1, 0), (0, 1, 0, 1), (0, 0, 1, 1))
_STRIDE = 16
"""Numbers that a group has of its own: two for each mask, and room."""


def masks(like: Tensor) -> Tensor:
    """All of them, [6, 4] on the device of `like`."""
    return torch.tensor(MASKS, dtype=torch.float32, device=like.device)


def agreement(kept: Tensor) -> Tensor:
    """Number of weights that each mask keeps of those that another keeps, [groups, 6].

    Args:
        kept: by the other, [groups, 4] bool.
    """
    return kept.float() @ masks(kept).T


def probabilities(logits: Tensor, noise: Tensor, *, scale: float, temperature: float) -> Tensor:
    """softmax((κ π + G) / τ), [groups, 6]."""
    return ((scale * logits + noise) / temperature).softmax(-1)


def mixture(chosen: Tensor) -> Tensor:
    """M = Σ p_k o_k, [groups, 4], of probabilities [groups, 6]."""
    return chosen @ masks(chosen)


def hardest(logits: Tensor) -> Tensor:
    """The mask of the largest logit, [groups, 4]; of equal ones the first."""
    return masks(logits)[logits.argmax(-1)]


def logit_gradient(
    chosen: Tensor, weights: Tensor, gradient: Tensor, *, scale: float, temperature: float, regularizer: float
) -> Tensor:
    """∂(loss − λ ‖W ⊙ M‖²) / ∂π, [groups, 6].

    Args:
        chosen: probabilities, [groups, 6].
        weights: W, flat.
        gradient: of the loss by W ⊙ M, flat.
        scale: κ.
        temperature: τ.
        regularizer: λ.
    """
    weights = weights.view(-1, GROUP)
    by_mask = weights * gradient.view(-1, GROUP) - 2 * regularizer * weights.square() * mixture(chosen)
    by_choice = by_mask @ masks(chosen).T
    return (scale / temperature) * chosen * (by_choice - (chosen * by_choice).sum(-1, keepdim=True))


def gumbel(groups: Tensor, seed: int, step: int) -> Tensor:
    """Standard Gumbel noise of a step, [groups, 6] fp32, by place in the whole model."""
    return -torch.log(-torch.log(_uniform(groups, 2 * len(MASKS), f"{seed} {step}")[:, : len(MASKS)])).float()


def normal(groups: Tensor, seed: int) -> Tensor:
    """Standard normal numbers, [groups, 6] fp32, by place in the whole model.

    Source: Box & Muller, A Note on the Generation of Random Normal Deviates (1958).
    """
    radius, angle = _uniform(groups, 2 * len(MASKS), f"{seed} logits").chunk(2, dim=-1)
    return (torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)).float()


def halves(values: Tensor) -> list[Tensor]:
    """Six numbers of each group as two of each weight, flat; the last two of eight are zeros."""
    padded = torch.nn.functional.pad(values, (0, 2 * GROUP - len(MASKS)))
    return [half.reshape(-1) for half in padded.chunk(2, dim=-1)]


def joined(first: Tensor, second: Tensor) -> Tensor:
    """What `halves` came from, [groups, 6]."""
    return torch.cat((first.view(-1, GROUP), second.view(-1, GROUP)), dim=-1)[:, : len(MASKS)].contiguous()


def _uniform(groups: Tensor, count: int, name: str) -> Tensor:
    """[groups, count] fp64 in (0, 1), by name."""
    from sparsecod_megatron.model.matrices import named_generator

    key = int(torch.randint(2**62, (), generator=named_generator(name, torch.device("cpu"))))
    places = groups[:, None] * _STRIDE + torch.arange(count, device=groups.device)
    return ((hashed(hashed(places) ^ key) >> 10).double() + 0.5) * 2.0**-53
