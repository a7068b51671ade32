"""Similarity of layers' representations: cosine of mean activations, and linear CKA.

Source: S. Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv 1905.00414.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecod_megatron.analysis.intervals import Array, Estimate, bootstrap, finite
from sparsecod_megatron.analysis.scores.base import HeatMap, Result
from sparsecod_megatron.analysis.scores.context import Context
from sparsecod_megatron.errors import ConfigError

MAX_GROUPS = 64
"""The intervals draw groups of sequences, single ones up to this many: so memory does not grow with the sample."""
CKA_TOKENS = 1024
"""Tokens compared with each other; CKA needs a matrix of all their pairs for each layer."""
CKA_RESAMPLES = 100


class Similarity:
    """Both measures between the outputs `h_{l+1}` of all pairs of blocks."""

    name = "similarity"

    def run(self, context: Context) -> Result:
        """Compute both matrices and their means over pairs of different blocks."""
        sums, kept, owners = _collect(context)
        num_layers, num_groups = sums.shape[1], len(sums)
        grams = _centred_grams(kept)
        cosine = bootstrap(lambda weights: _cosines(weights, sums), num_groups, seed=context.seed)
        cka = bootstrap(_weighted_cka(grams, owners), num_groups, seed=context.seed, num_resamples=CKA_RESAMPLES)
        different = np.triu_indices(num_layers, k=1)
        values: dict[str, Any] = {"cka_tokens": len(owners)}
        if num_layers > 1:
            for name, matrix in (("cosine", cosine), ("cka", cka)):
                values[f"similarity_{name}"] = finite(matrix.value[different].mean())
        return Result(
            values=values,
            tables={self.name: _rows(cosine, cka)},
            figures=(
                _heat_map("similarity_cosine", "Cosine of mean activations", cosine),
                _heat_map("similarity_cka", "Linear CKA", cka),
            ),
            num_sequences=context.num_sequences,
            num_tokens=context.num_sequences * context.seq_length,
        )


def _collect(context: Context) -> tuple[Array, Tensor, Array]:
    """One pass: sums of activations [groups, L, d], kept tokens [L, n, d] float64, and each one's group [n]."""
    num_layers, size = len(context.layers), context.hidden_size
    num_sequences, length = context.num_sequences, context.seq_length
    num_groups, own = min(MAX_GROUPS, num_sequences), context.processes.places(num_sequences)
    sums = torch.zeros(num_groups, num_layers, size, dtype=torch.float64)
    wanted = torch.randperm(num_sequences * length, generator=context.generator())[:CKA_TOKENS].sort().values
    if len(wanted) < 2:
        raise ConfigError("--seq-length 1 --samples 1: similarity compares tokens; give more of them")
    kept = torch.zeros(num_layers, len(wanted), size, dtype=torch.float64)
    first, filled = own.start, int((wanted < own.start * length).sum())
    for trace in context.traces("all", title="similarity"):
        batch = len(trace.tokens)
        groups = torch.arange(first, first + batch) % num_groups
        here = wanted[(wanted >= first * length) & (wanted < (first + batch) * length)] - first * length
        for layer, hidden in enumerate(map(context.layers.state.view, trace.hidden[1:])):
            sums[:, layer].index_add_(0, groups, hidden.double().sum(dim=1).cpu())
            kept[layer, filled : filled + len(here)] = hidden.flatten(0, 1)[here.to(hidden.device)].double().cpu()
        first, filled = first + batch, filled + len(here)
    sums, kept = context.processes.total(sums), context.processes.total(kept)
    return sums.numpy(), kept, ((wanted // length) % num_groups).numpy()


def _cosines(weights: Array, sums: Array) -> Array:
    """[resamples, groups] and [groups, L, d] → [resamples, L, L]."""
    means = np.einsum("rg,gld->rld", weights, sums, optimize=True)
    lengths = np.linalg.norm(means, axis=-1, keepdims=True)
    unit = np.divide(means, lengths, out=np.zeros_like(means), where=lengths > 0)
    cosines: Array = unit @ unit.transpose(0, 2, 1)
    return cosines


def _centred_grams(kept: Tensor) -> Array:
    """[L, n, d] → [L, n, n] products of the tokens' activations, float32: only their ratios matter."""
    centred = kept - kept.mean(dim=1, keepdim=True)
    centred = centred / centred.norm(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    grams: Array = (centred @ centred.transpose(1, 2)).float().numpy()
    return grams


def _weighted_cka(grams: Array, owners: Array) -> Callable[[Array], Array]:
    """CKA as a function of how often each group of sequences counts.

    Tokens of a group count alike, so sums over pairs of tokens are taken once, by pairs of groups; a resample then
    costs no product of whole matrices. With Σ w = 1 and r the row means of a matrix weighted by w, centring by w gives
    `⟨A, B⟩ = Σ_ij w_i w_j A_ij B_ij − 2 Σ_i w_i rA_i rB_i + (w·rA)(w·rB)`.

    Args:
        grams: [L, n, n], centred by uniform weights, so that little is left to subtract.
        owners: [n] group of each token.

    Returns:
        weights [resamples, groups], of which some may own no token, → [resamples, L, L].
    """
    order = np.argsort(owners, kind="stable")
    grams = grams[:, order][:, :, order]
    present, starts, sizes = np.unique(owners[order], return_index=True, return_counts=True)
    by_group = np.add.reduceat(grams, starts, axis=2, dtype=np.float64)  # [L, n, present]
    num_layers = len(grams)
    upper = list(combinations_with_replacement(range(num_layers), 2))
    products = np.empty((len(upper), len(present), len(present)))
    for index, (first, second) in enumerate(upper):
        rows = np.add.reduceat(grams[first] * grams[second], starts, axis=0, dtype=np.float64)
        products[index] = np.add.reduceat(rows, starts, axis=1)

    def statistic(weights: Array) -> Array:
        result = np.empty((len(weights), num_layers, num_layers))
        for resample, counts in enumerate(weights[:, present]):
            share = counts / (counts @ sizes)  # of each token of a group
            tokens = np.repeat(share, sizes)
            means = by_group @ share  # [L, n]
            corrections = means @ tokens  # [L]
            inner = (means * tokens) @ means.T
            for value, (first, second) in zip(products @ share @ share, upper, strict=True):
                centred = value - 2 * inner[first, second] + corrections[first] * corrections[second]
                result[resample, first, second] = result[resample, second, first] = centred
        norms = np.sqrt(np.diagonal(result, axis1=1, axis2=2))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(result / (norms[:, :, None] * norms[:, None, :]))

    return statistic


def _rows(cosine: Estimate, cka: Estimate) -> list[dict[str, Any]]:
    rows = []
    for first, second in combinations_with_replacement(range(len(cosine.value)), 2):
        row: dict[str, Any] = {"first": first, "second": second}
        for name, matrix in (("cosine", cosine), ("cka", cka)):
            value, low, high = matrix.at(first, second)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return rows


def _heat_map(name: str, title: str, matrix: Estimate) -> HeatMap:
    shown = [[finite(value) for value in row] for row in matrix.value.tolist()]
    return HeatMap(name, title, shown, row_label="block", column_label="block")
