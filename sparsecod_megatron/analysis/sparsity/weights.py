"""The `weights` score: how many weights are small, by three yardsticks, and how many the model can do without.

A threshold fixed at initialisation measures the norm as much as sparsity: AdamW with weight decay settles at
`E[w²] → η/2λ` for a weight that only sees gradient noise, so stronger decay moves every weight towards zero. The same
shares relative to each matrix's own standard deviation, Hoyer's measure and the Gini index do not change when a matrix
is scaled. Both are always reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tqdm import tqdm

from sparsecod_megatron.analysis.scores.base import Bars, Lines, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.analysis.sparsity.cuts import cuts_by
from sparsecod_megatron.analysis.sparsity.essential import (
    GRID,
    INCREASE_ALLOWED,
    find_essential,
    relative_increase,
)
from sparsecod_megatron.analysis.sparsity.magnitudes import gini, hoyer, share_below
from sparsecod_megatron.analysis.sparsity.means import mean_row
from sparsecod_megatron.analysis.sparsity.pruning import PruningCurve
from sparsecod_megatron.analysis.sparsity.ranks import ranks
from sparsecod_megatron.hf.matrices import KINDS, Matrix, find_matrices, unmeasured_share

EPSILONS = (1e-4, 1e-3, 1e-2)
MAX_UNMEASURED = 0.03
"""Share of the blocks' weights; routers and convolutions stay below it, a part that was not found exceeds it."""
Row = dict[str, Any]


class Weights:
    """Magnitudes of all attention and feed-forward matrices, and the curve of one-shot pruning.

    Args:
        curve_score: of `CURVE_SCORES`; by what the curve prunes.
        patterns: n and m of further points.
    """

    name = "weights"

    def __init__(self, curve_score: str = "magnitude", patterns: Sequence[tuple[int, int]] = ()) -> None:
        self._score, self._patterns = curve_score, patterns

    def run(self, context: Context) -> Result:
        """Measure the matrices, then prune them.

        Args:
            context: the model and the sample the losses are taken on.
        """
        matrices = find_matrices(context.model, context.layers)
        left_out = unmeasured_share(context.layers.blocks, matrices)
        init_std = initial_std(context.model.config)
        rows = matrix_rows(matrices, init_std, no_bar=context.processes.no_progress)
        curve = PruningCurve(context, matrices, cuts_by(self._score, context, matrices))
        curve.evaluate(GRID)
        essential = find_essential(curve, seed=context.seed)
        points = [_point(curve, s, curve.losses(s)) for s in curve.sparsities]
        sparsity = essential.sparsity.as_dict()
        # Under names of their own, so that nobody compares two curves of different scores.
        suffix = "" if self._score == "magnitude" else f"_{self._score}"
        return Result(
            values={
                "unmeasured_share": left_out,
                "init_std": init_std,
                **mean_row(rows),
                f"essential_sparsity{suffix}": sparsity,
                f"essential_share{suffix}": None if sparsity["value"] is None else 1 - sparsity["value"],
                f"pruning_knee{suffix}": essential.knee,
            },
            tables={
                "weights": rows,
                "weights_by_kind": by_kind(rows),
                f"weights_pruning{suffix}": points,
                **({f"weights_patterns{suffix}": self._pattern_rows(curve)} if self._patterns else {}),
            },
            per_sequence={
                "dense_loss": curve.losses(0.0).tolist(),
                f"half_pruned_loss{suffix}": curve.losses(0.5).tolist(),
            },
            figures=_figures(rows, points, len(context.layers), suffix),
            warnings=_warnings(left_out, init_std),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )

    def _pattern_rows(self, curve: PruningCurve) -> list[Row]:
        return [
            {"pattern": f"{kept}:{of}", **_point(curve, 1 - kept / of, curve.pattern_losses(kept, of))}
            for kept, of in self._patterns
        ]


def _point(curve: PruningCurve, sparsity: float, losses: Tensor) -> Row:
    """A point of a table of losses."""
    increase = relative_increase(losses, curve.losses(0.0))
    return {"sparsity": sparsity, "loss": float(losses.mean()), "loss_increase": increase}


def initial_std(config: Any) -> float | None:
    """Standard deviation of the weights at initialisation, from the model's configuration; None if it has none."""
    text = config.get_text_config()
    std = getattr(text, "initializer_range", None)
    return float(std) if std else None


def matrix_rows(matrices: Sequence[Matrix], init_std: float | None, no_bar: bool | None = None) -> list[Row]:
    """One row per matrix: its size and spread, shares below each ε by both yardsticks, Hoyer, Gini and ranks.

    Args:
        matrices: matrices of the model.
        init_std: yardstick of the `below_init_*` columns, which are None without it.
        no_bar: what tqdm takes as `disable`.
    """
    rows = []
    for matrix in tqdm(matrices, desc="weights", unit="matrix", leave=False, disable=no_bar):
        weight = matrix.weight.detach().float()
        std = float(weight.std(correction=0))
        stable, effective = ranks(weight)
        rows.append(
            {
                "layer": matrix.layer,
                "kind": matrix.kind,
                "name": matrix.name,
                "elements": weight.numel(),
                "std": std,
                "std_over_init": std / init_std if init_std else None,
                "exact_zero": float((weight == 0).sum()) / weight.numel(),
                **{f"below_init_{e:.0e}": share_below(weight, e * init_std) if init_std else None for e in EPSILONS},
                **{f"below_own_{e:.0e}": share_below(weight, e * std) for e in EPSILONS},
                "hoyer": hoyer(weight),
                "gini": gini(weight),
                "stable_rank": stable,
                "effective_rank": effective,
            }
        )
    return rows


def by_kind(rows: Sequence[Row]) -> list[Row]:
    """`mean_row` of each kind of matrix."""
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    return [{"kind": kind, **mean_row([row for row in rows if row["kind"] == kind])} for kind in kinds]


def _warnings(left_out: float, init_std: float | None) -> tuple[str, ...]:
    warnings = []
    if left_out > MAX_UNMEASURED:
        warnings.append(
            f"{left_out:.1%} of the blocks' weights are in no matrix that was found: routers, convolutions, and "
            "weights that the model uses without calling their module, or does not use; these numbers leave them out"
        )
    if not init_std:
        warnings.append("the model's configuration names no initializer_range: own-std shares only")
    return tuple(warnings)


def _figures(rows: Sequence[Row], points: Sequence[Row], num_layers: int, suffix: str) -> tuple[Bars | Lines, ...]:
    layers = [[row for row in rows if row["layer"] == layer] for layer in range(num_layers)]
    gini_by_layer = [mean_row(found)["gini"] if found else None for found in layers]
    grid = [point for point in points if point["sparsity"] in GRID]
    return (
        Lines(
            f"weights_pruning{suffix}",
            f"One-shot pruning{suffix.replace('_', ', ')}",
            [point["sparsity"] for point in grid],
            {"ΔL/L": [point["loss_increase"] for point in grid]},
            "sparsity",
            "relative loss increase",
            line=INCREASE_ALLOWED,
        ),
        Bars("weights_gini", "Gini index of the weights", gini_by_layer, "Gini index"),
    )
