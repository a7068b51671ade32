"""How much each weight of a matrix matters: the lowest scores are pruned first.

Source: Wanda: arXiv 2306.11695. GBLM: arXiv 2311.04902. OBS: B. Hassibi, D. Stork, "Second order derivatives for
network pruning: Optimal Brain Surgeon", 1992.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from sparsecod_megatron.compression.reconstruct import inverse_factor
from sparsecod_megatron.compression.statistics import InputStatistics
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.parallel.processes import Processes


@dataclass(frozen=True)
class Evidence:
    """What a score may look at.

    Attributes:
        name: of the matrix in the model, with the number of an expert in a fused parameter.
        weight: `[out, in]`, float32.
        statistics: of the inputs; None where the rule asks for none.
        gradients: √Σ_s g_s² over sequences s, float32 `[out, in]`, of the dense model's mean loss; None likewise.
        num_sequences: calibration sequences.
        damping: of the inputs' Hessian, as a share of its mean diagonal.
        alpha: weight of GBLM's gradients.
        compat: GBLM's published scales.
        seed: seed of what is random.
    """

    name: str
    weight: Tensor
    statistics: InputStatistics | None
    gradients: Tensor | None
    num_sequences: int
    damping: float
    alpha: float
    compat: bool
    seed: int

    @property
    def inputs(self) -> InputStatistics:
        """The statistics of a score that asked for them."""
        assert self.statistics is not None
        return self.statistics


def magnitude(evidence: Evidence) -> Tensor:
    """|W|."""
    return evidence.weight.abs()


def wanda(evidence: Evidence) -> Tensor:
    """|W_ij| · ‖X_j‖."""
    return evidence.weight.abs().mul_(evidence.inputs.norms)


def gblm(evidence: Evidence) -> Tensor:
    """|W|·‖X‖ + α·|W|·√Σ_s g_s², each term over its own mean, so that α = 1 is the same for every model and loss.

    With `compat`, the published scales: |W|·‖X‖/√sequences + α·|W|·√Σ_s g_s², where α = 100.
    """
    assert evidence.gradients is not None
    by_inputs, by_gradients = wanda(evidence), evidence.weight.abs() * evidence.gradients
    if evidence.compat:
        return by_inputs / math.sqrt(evidence.num_sequences) + evidence.alpha * by_gradients
    return by_inputs / by_inputs.mean() + evidence.alpha * by_gradients / by_gradients.mean().clamp_min(1e-30)


def obs(evidence: Evidence) -> Tensor:
    """w² / [H⁻¹]_jj: what one weight alone costs, once all others of its row have answered."""
    factor = inverse_factor(evidence.inputs.hessian, evidence.damping)
    return evidence.weight.square().div_(factor.square_().sum(0))


def random(evidence: Evidence) -> Tensor:
    """Uniform, by the seed and the matrix's name."""
    generator = torch.Generator().manual_seed(evidence.seed + zlib.crc32(evidence.name.encode()))
    return torch.rand(evidence.weight.shape, generator=generator).to(evidence.weight.device)


SCORES: dict[str, Callable[[Evidence], Tensor]] = {
    "magnitude": magnitude,
    "wanda": wanda,
    "gblm": gblm,
    "obs": obs,
    "random": random,
}


def gradient_norms(
    model: PreTrainedModel, sequences: Tensor, weights: dict[str, nn.Parameter], processes: Processes
) -> dict[str, Tensor]:
    """√Σ_s g_s² of each parameter, g_s the gradient of the mean loss of sequence s of the model as it is. Collective.

    Args:
        model: a causal LM in evaluation mode.
        sequences: int64 `[sequences, tokens]`, of all processes together.
        weights: parameters by name.
        processes: those that share the sequences.

    Returns:
        Float32, shaped like the parameters: the memory of the whole model once more, and of its gradients.

    Raises:
        ConversionError: a loss that is non-finite.
    """
    needed = {name: parameter.requires_grad for name, parameter in weights.items()}
    squares = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in weights.items()}
    try:
        for parameter in weights.values():
            parameter.requires_grad_(True)
        own = sequences[processes.places(len(sequences))]
        for sequence in tqdm(own, desc="gradients", unit="seq", disable=processes.no_progress):
            _add_squares(model, sequence[None].to(model.device), weights, squares)
    finally:
        for name, parameter in weights.items():
            parameter.requires_grad_(needed[name])
    return {name: processes.total(total).sqrt() for name, total in squares.items()}


def _add_squares(
    model: PreTrainedModel, tokens: Tensor, weights: dict[str, nn.Parameter], squares: dict[str, Tensor]
) -> None:
    with torch.enable_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0, :-1].float(), tokens[0, 1:])
        gradients: Sequence[Tensor | None] = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
    if not torch.isfinite(loss):
        raise ConversionError("gblm: the model's loss on the calibration data is non-finite; use another method")
    for name, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:  # an expert that no token of this sequence chose
            squares[name] += gradient.float().square()
