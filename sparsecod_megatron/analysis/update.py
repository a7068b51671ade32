"""The `update` score: how many weights an update between two checkpoints left as they were, and how many rounding did.

A weight in bfloat16 that moves by less than half a step of the format stays: a dense update of standard deviation 1e-5
leaves four fifths of weights of the usual size "unchanged", and the share measures the size of the update, not its
sparsity. So each tensor has a baseline, what a dense Gaussian update of the same size would leave:

    unchanged_stored    share of equal values as stored
    unchanged_bf16      share of equal values after rounding both to bfloat16
    unchanged_expected  E[max(0, 1 − |δ| / ulp(w))], δ ~ N(0, σ²): an unrounded weight lies anywhere between two values
    excess              unchanged_bf16 − unchanged_expected: 0 for a dense update, whatever its size
    update_rms          σ, the root mean square of the update before rounding
    relative_norm       ‖Δ‖ / ‖W‖
    stable_rank, effective_rank    of Δ as stored (`sparsity/ranks.py`); rounding has a share in them

Where both files hold bfloat16, rounding is in the difference too. With x = δ / ulp the observed mean square is that of
x² + r (1 − r), r the fractional part of |x|, of which the mean over a Gaussian of standard deviation a is
a² + 1/6 − Σ_k exp(−2 π² k² a²) / (π k)²; σ is where the sum over all weights' steps is what was observed.

In fp32 with weight decay hardly a weight keeps its bits, so `unchanged_stored` says nothing there.

Source: Mukherjee et al., Reinforcement Learning Finetunes Small Subnetworks in Large Language Models
(arXiv 2505.11711), for the share; the baseline is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sparsecod_megatron.analysis.scores.base import Bars, Result
from sparsecod_megatron.analysis.sparsity.means import mean_row
from sparsecod_megatron.analysis.sparsity.ranks import ranks
from sparsecod_megatron.errors import ConversionError

NAME = "update"
MANTISSA_BITS = 7
"""Stored bits of bfloat16."""
NUM_TERMS = 200
"""The series is exact where σ is above a 200th of a step; below, its limit is taken, the mean of |x|."""
NUM_BISECTIONS = 60
Row = dict[str, Any]


@dataclass(frozen=True)
class Steps:
    """The steps of bfloat16 at the values of a tensor: few, because they depend on the exponent alone.

    Attributes:
        sizes: [steps], fp64.
        counts: [steps], how many values have each.
        num_zeros: values that are zero, which any update changes.
    """

    sizes: Tensor
    counts: Tensor
    num_zeros: int

    @classmethod
    def of(cls, weight: Tensor) -> Steps:
        """Count them."""
        live = weight[weight != 0].float()
        exponents, counts = torch.unique(torch.frexp(live).exponent, return_counts=True)
        # frexp's mantissa lies in [1/2, 1).
        sizes = torch.pow(2.0, exponents.double() - 1 - MANTISSA_BITS)
        return cls(sizes, counts, int((weight == 0).sum()))

    def unchanged(self, sigma: float) -> float:
        """Share of values that a Gaussian update leaves, E[max(0, 1 − |δ| / ulp)]."""
        total = int(self.counts.sum()) + self.num_zeros
        if sigma == 0:
            return 1.0
        ratio = self.sizes / sigma
        stay = torch.erf(ratio / math.sqrt(2)) - math.sqrt(2 / math.pi) / ratio * -torch.expm1(-ratio.square() / 2)
        return float((stay * self.counts).sum()) / total

    def sigma(self, mean_square: float) -> float:
        """Root mean square before rounding of an update whose rounded mean square is this."""
        total, low, high = int(self.counts.sum()) + self.num_zeros, 0.0, math.sqrt(mean_square)
        for _ in range(NUM_BISECTIONS):
            middle = (low + high) / 2
            seen = self.sizes.square() * _rounded_mean_square(middle / self.sizes)
            unrounded = self.num_zeros * middle**2
            is_above = float((seen * self.counts).sum()) + unrounded > mean_square * total
            low, high = (low, middle) if is_above else (middle, high)
        return (low + high) / 2


def _rounded_mean_square(a: Tensor) -> Tensor:
    """Mean of x² + r (1 − r) over x ~ N(0, a²), in steps squared; see the top of this file."""
    k = torch.arange(1, NUM_TERMS + 1, dtype=a.dtype)[:, None]
    series = (torch.exp(-2 * (math.pi * k * a).square()) / (math.pi * k).square()).sum(0)
    return torch.where(a < 1 / NUM_TERMS, a * math.sqrt(2 / math.pi), a.square() + 1 / 6 - series)


def measure_update(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], other: Mapping[str, Tensor] | None = None
) -> Result:
    """Measure the update of every tensor, one in memory at a time.

    Args:
        before: name to tensor, read when it is asked for.
        after: of the same architecture.
        other: another model made from `before`, to see which values both updates changed.

    Raises:
        ConversionError: no tensor in common, or one of another shape.
    """
    models = [before, after] if other is None else [before, after, other]
    names = [name for name in before if all(name in model for model in models)]
    left_out = {name for model in models for name in model} - set(names)
    if not names:
        raise ConversionError("update: the models have no tensor in common; give checkpoints of one architecture")
    rows = [_row(name, [model[name] for model in models]) for name in tqdm(names, desc=NAME, leave=False, disable=None)]
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    by_layer = [{"layer": layer, **mean_row([row for row in rows if row["layer"] == layer])} for layer in layers]
    kinds = dict.fromkeys(row["kind"] for row in rows)
    by_kind = [{"kind": kind, **mean_row([row for row in rows if row["kind"] == kind])} for kind in kinds]
    figures = tuple(
        Bars(f"{NAME}_{name}", title, [row[name] for row in by_layer], name)
        for name, title in (("unchanged_bf16", "Unchanged in bfloat16"), ("excess", "Unchanged beyond rounding"))
        if layers
    )
    return Result(
        values=mean_row(rows),
        tables={NAME: rows, f"{NAME}_by_layer": by_layer, f"{NAME}_by_kind": by_kind},
        figures=figures,
        warnings=_warnings(left_out, rows),
    )


def _row(name: str, tensors: Sequence[Tensor]) -> Row:
    first, second = tensors[:2]
    if any(tensor.shape != first.shape for tensor in tensors):
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise ConversionError(f"update: {name} has the shapes {shapes}; give checkpoints of one architecture")
    is_rounded = any(tensor.dtype == torch.bfloat16 for tensor in (first, second))
    if is_rounded:
        first, second = first.bfloat16(), second.bfloat16()
    delta = second.double() - first.double()
    steps, square = Steps.of(first), float(delta.square().mean())
    sigma = steps.sigma(square) if is_rounded else math.sqrt(square)
    unchanged = first.bfloat16() == second.bfloat16()
    expected, norm = steps.unchanged(sigma), float(first.double().norm())
    stable, effective = ranks(delta) if first.ndim > 1 else (None, None)
    layer, kind = _place(name)
    row = {
        "layer": layer,
        "kind": kind,
        "name": name,
        "elements": first.numel(),
        "unchanged_stored": float((tensors[0] == tensors[1]).double().mean()) if _alike(tensors[:2]) else None,
        "unchanged_bf16": float(unchanged.double().mean()),
        "unchanged_expected": expected,
        "excess": float(unchanged.double().mean()) - expected,
        "update_rms": sigma,
        "relative_norm": float(delta.norm()) / norm if norm else None,
        "stable_rank": stable,
        "effective_rank": effective,
    }
    return row if len(tensors) == 2 else row | _overlap(~unchanged, first.bfloat16() != tensors[2].bfloat16())


def _overlap(changed: Tensor, others: Tensor) -> Row:
    """Share of the values changed by one update that the other changed too, and what chance makes it."""
    both, count = int((changed & others).sum()), int(changed.sum())
    return {"overlap": both / count if count else None, "overlap_by_chance": float(others.double().mean())}


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({tensor.dtype for tensor in tensors}) == 1


def _place(name: str) -> tuple[int | None, str]:
    """Layer, from the number in the name, and what follows it; embeddings and the like have no layer."""
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return (None, name) if at is None else (int(parts[at]), ".".join(parts[at + 1 :]))


def _warnings(left_out: set[str], rows: Sequence[Row]) -> tuple[str, ...]:
    warnings = []
    if left_out:
        warnings.append(f"{len(left_out)} tensors are not in every model and are left out, such as {min(left_out)}")
    if mixed := sum(row["unchanged_stored"] is None for row in rows):
        warnings.append(
            f"{mixed} tensors are stored in two formats, so only what is equal after rounding both to bfloat16 is "
            "compared; export both with the same --dtype"
        )
    return tuple(warnings)
