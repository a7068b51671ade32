"""Weight sparsity of models trained with different weight decay, in one table.

More decay means smaller weights, so a share below a fixed threshold rises with decay even where no weight is closer to
zero than its neighbours. The table sets the fixed and the relative shares side by side, next to the spread that AdamW's
noise equilibrium predicts.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsecod_megatron.analysis.sparsity.means import mean_row
from sparsecod_megatron.analysis.sparsity.weights import by_kind, initial_std, matrix_rows
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.hf.blocks import find_layers
from sparsecod_megatron.hf.matrices import find_matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decay_rows(
    model: PreTrainedModel, *, label: str, weight_decay: float | None, lr: float | None
) -> list[dict[str, Any]]:
    """One row for all matrices of a model together, then one for each kind.

    Args:
        model: a causal LM.
        label: names it in the table.
        weight_decay: λ it was trained with, if known.
        lr: η it was trained with, if known.
    """
    layers = find_layers(model.requires_grad_(False))
    matrices = find_matrices(model, layers)
    rows = matrix_rows(matrices, initial_std(model.config))
    head = {"model": label, "weight_decay": weight_decay, "equilibrium_std": equilibrium_std(lr, weight_decay)}
    return [{**head, **row} for row in ({"kind": "all", **mean_row(rows)}, *by_kind(rows))]


def equilibrium_std(lr: float | None, weight_decay: float | None) -> float | None:
    """`√(η/2λ)`: where AdamW's noise and decay balance for a weight whose gradient is noise alone.

    Args:
        lr: η, at least 0.
        weight_decay: λ; at 0 there is no equilibrium.
    """
    return math.sqrt(lr / (2 * weight_decay)) if lr and weight_decay else None


def match_decays(num_models: int, weight_decays: Sequence[float]) -> list[float | None]:
    """One weight decay per model, or none at all.

    Raises:
        ConfigError: another number of them, or a negative one.
    """
    if weight_decays and len(weight_decays) != num_models:
        raise ConfigError(
            f"--weight-decay: {len(weight_decays)} values for {num_models} models; give one per model, in order"
        )
    if any(value < 0 for value in weight_decays):
        raise ConfigError(f"--weight-decay {min(weight_decays):g}: must not be negative")
    return list(weight_decays) or [None] * num_models


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as CSV text; None is an empty field."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
