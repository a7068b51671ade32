"""The two terms of distillation with their gradients in closed form, on tensors that ranks share.

With h the residual stream of student (s) and teacher (t), n the tokens of a sequence, z the logits, T the temperature:

    squarehead   mean over sequences of  Σ ‖h_s − h_t‖² / (Σ ‖h_t‖² + ε n H),  sums over tokens; ε that of bf16
    kl           mean over tokens of     T² Σ_v p_v (log p_v − log q_v),  p = softmax(z_t / T),  q = softmax(z_s / T)

The gradients are 2 (h_s − h_t) / (…) and T (q − p). They are computed with the values, in the forward pass, so that
nothing of the teacher is kept for the backward pass. The reference takes squarehead's ratio over a micro-batch; over a
sequence, which is the same for micro-batches of one, it depends on no layout.

Source: Kurtic et al., Sparse Fine-tuning for Inference Acceleration of Large Language Models (arXiv 2310.06927), and
its code for ε; Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531) for T².
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from sparsecod_megatron.parallel import reduced

EPSILON = torch.finfo(torch.bfloat16).eps


def inverse_squares(
    teacher: Tensor, samples: Tensor, count: int, size: int, groups: Iterable[dist.ProcessGroup]
) -> Tensor:
    """1 / (Σ ‖h_t‖² + ε n H) of the sequence of each token, [S_local, B] fp32. Collective over `groups`.

    Args:
        teacher: its residual stream, [S_local, B, H].
        samples: which sequence of the micro-batch each token is of, [S_local, B] int64.
        count: sequences of the micro-batch.
        size: n H: numbers of a whole sequence's residual stream.
        groups: ranks that hold other tokens of the sequences.
    """
    squares = teacher.float().square().sum(-1)
    sums = torch.zeros(count, dtype=torch.float32, device=teacher.device).index_add_(
        0, samples.flatten(), squares.flatten()
    )
    for group in groups:
        reduced(sums, group)
    return (1 / (sums + EPSILON * size))[samples]


def squarehead(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w ‖h_s − h_t‖² of these tokens, [] fp32, and its gradient, [S_local, B, H] fp32. Local.

    Args:
        student: residual stream, [S_local, B, H].
        teacher: the same of the other model.
        weights: w of each token, [S_local, B].
    """
    difference = student.detach().float() - teacher.float()
    weighted = difference * weights[..., None]
    return (weighted * difference).sum(), 2 * weighted


def kl_divergence(
    student: Tensor, teacher: Tensor, temperature: float, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """T² KL(teacher ‖ student), mean over these tokens, [] fp32, and its gradient [S, B, V / TP] fp32.

    Collective over `group`, whose ranks get the same value.

    Args:
        student: logits [S, B, V / TP].
        teacher: the same of the other model.
        temperature: T.
        group: ranks that share the vocabulary.
    """
    ours, theirs = (_log_probabilities(logits.detach().float() / temperature, group) for logits in (student, teacher))
    expected = theirs.exp()
    value = reduced((expected * (theirs - ours)).sum(), group)
    tokens = student[..., 0].numel()
    return value * temperature**2 / tokens, (ours.exp() - expected) * (temperature / tokens)


def _log_probabilities(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log softmax over a vocabulary that ranks share."""
    largest = reduced(logits.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
    shifted = logits - largest
    total = reduced(shifted.exp().sum(-1, keepdim=True), group)
    return shifted - total.log()
