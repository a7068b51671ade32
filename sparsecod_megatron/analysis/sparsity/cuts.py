"""Which weights a pruning curve takes: the smallest of all matrices, each row's lowest by Wanda's score, or n:m.

Magnitudes compete over all matrices, as in the definition of essential sparsity. Wanda's |W|·‖x‖ compares within a row
only, because inputs of different layers have different sizes.

Source: Jaiswal et al., The Emergence of Essential Sparsity (arXiv 2306.03805), for the curve; Sun et al., A Simple and
Effective Pruning Approach (arXiv 2306.11695), for Wanda's score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.quantiles import kth_magnitudes
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.hf.expert_modules import is_fused_experts
from sparsecod_megatron.hf.matrices import Matrix
from sparsecod_megatron.mechanisms.weights.engine.patterns import parsed_pattern, smallest_of_each

CURVE_SCORES = ("magnitude", "wanda")
Cut = Callable[[int, Tensor], Tensor]
"""Index of a matrix and its weight as stored → bool of that shape, True where a weight goes."""


class Cuts(Protocol):
    """Makes cuts of given shares, or of a pattern."""

    def shares(self, sparsities: Sequence[float]) -> list[Cut]:
        """A cut for each share of the weights in [0, 1]."""
        ...

    def pattern(self, kept: int, of: int) -> Cut:
        """`kept` of every `of` neighbours along the input stay."""
        ...


@dataclass(frozen=True)
class MagnitudeCuts:
    """By |w|; shares are of all matrices together."""

    matrices: Sequence[Matrix]

    def shares(self, sparsities: Sequence[float]) -> list[Cut]:
        """As `Cuts`: one threshold for all matrices, found in one pair of passes over the weights."""
        weights = [matrix.weight.detach() for matrix in self.matrices]
        total = sum(weight.numel() for weight in weights)
        thresholds = kth_magnitudes(weights, [int(sparsity * total) for sparsity in sparsities])
        return [partial(_below, threshold) for threshold in thresholds]

    def pattern(self, kept: int, of: int) -> Cut:
        """As `Cuts`."""
        return lambda index, weight: _neighbours(self.matrices[index], weight.abs(), kept, of)


@dataclass(frozen=True)
class WandaCuts:
    """By |w|·‖x‖; shares are of each row.

    Attributes:
        matrices: linear layers alone.
        norms: of each, ‖x_j‖ over the sample's tokens, float32 [in].
    """

    matrices: Sequence[Matrix]
    norms: Sequence[Tensor]

    @classmethod
    def of(cls, context: Context, matrices: Sequence[Matrix]) -> WandaCuts:
        """Measure the inputs. Collective over the context's processes.

        Raises:
            ConversionError: experts in one tensor, whose inputs are not seen one by one.
        """
        for matrix in matrices:
            if is_fused_experts(matrix.module):
                raise ConversionError(
                    f"--curve-score wanda: layer {matrix.layer} holds its experts in one tensor, whose inputs are not "
                    "seen one by one; use --curve-score magnitude, or `sparsecod compress --method wanda`"
                )
        squares = [
            torch.zeros(_num_inputs(matrix), dtype=torch.float64, device=matrix.weight.device) for matrix in matrices
        ]

        def observe(total: Tensor, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
            total += inputs[0].detach().flatten(end_dim=-2).double().square().sum(0)

        with ExitStack() as stack, torch.no_grad():
            for matrix, total in zip(matrices, squares, strict=True):
                stack.callback(matrix.module.register_forward_pre_hook(partial(observe, total)).remove)
            for tokens, _ in context.batches("all", title="inputs"):
                context.model(input_ids=tokens.to(context.device), use_cache=False)
        sums = context.processes.total(torch.cat(squares)).split([len(total) for total in squares])
        return cls(matrices, [each.sqrt().float() for each in sums])

    def shares(self, sparsities: Sequence[float]) -> list[Cut]:
        """As `Cuts`: a threshold for each row."""
        return [partial(self._rows, sparsity) for sparsity in sparsities]

    def pattern(self, kept: int, of: int) -> Cut:
        """As `Cuts`."""
        return lambda index, weight: _neighbours(self.matrices[index], self._score(index, weight), kept, of)

    def _score(self, index: int, weight: Tensor) -> Tensor:
        norms = self.norms[index]
        return weight.float().abs() * (norms[:, None] if self.matrices[index].transposed else norms)

    def _rows(self, sparsity: float, index: int, weight: Tensor) -> Tensor:
        axis = 0 if self.matrices[index].transposed else 1
        score, count = self._score(index, weight), int(sparsity * weight.shape[axis])
        lowest = score.topk(count, dim=axis, largest=False, sorted=False).indices
        return torch.zeros_like(weight, dtype=torch.bool).scatter_(axis, lowest, True)


def cuts_by(score: str, context: Context, matrices: Sequence[Matrix]) -> Cuts:
    """The cuts of a name in `CURVE_SCORES`."""
    return WandaCuts.of(context, matrices) if score == "wanda" else MagnitudeCuts(matrices)


def read_pattern(text: str) -> tuple[int, int]:
    """n and m of `n:m`.

    Raises:
        ConfigError: not such a pattern.
    """
    found = parsed_pattern(text)
    if found is None:
        raise ConfigError(f"--curve-pattern {text}: not n:m with n below m; give some such as 2:4,1:4")
    return found


def _below(threshold: float, _index: int, weight: Tensor) -> Tensor:
    return weight.abs() <= threshold


def _num_inputs(matrix: Matrix) -> int:
    return matrix.weight.shape[-2 if matrix.transposed else -1]


def _neighbours(matrix: Matrix, score: Tensor, kept: int, of: int) -> Tensor:
    rows = score.mT if matrix.transposed else score
    if rows.shape[-1] % of:
        raise ConfigError(
            f"--curve-pattern {kept}:{of}: layer {matrix.layer}'s {matrix.name} has {rows.shape[-1]} inputs, which "
            f"{of} does not divide; leave it out"
        )
    gone = smallest_of_each(rows, kept, of)
    return gone.mT if matrix.transposed else gone
