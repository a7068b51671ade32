"""Scores by name. A score's module is imported when it is asked for, so that one does not wait for the others."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from sparsecod_megatron.analysis.scores.base import Score
from sparsecod_megatron.errors import ConfigError

SCORES = {
    "causal": "sparsecod_megatron.analysis.scores.causal:Causal",
    "permutation": "sparsecod_megatron.analysis.scores.permutation:Permutation",
    "usefulness": "sparsecod_megatron.analysis.scores.usefulness:Usefulness",
    "jacobian": "sparsecod_megatron.analysis.scores.jacobian:Jacobian",
    "similarity": "sparsecod_megatron.analysis.scores.similarity:Similarity",
    "skip": "sparsecod_megatron.analysis.scores.skip:Skip",
    "lens": "sparsecod_megatron.analysis.scores.lens:Lens",
    "experts": "sparsecod_megatron.analysis.sparsity.experts:Experts",
    "weights": "sparsecod_megatron.analysis.sparsity.weights:Weights",
    "attention": "sparsecod_megatron.analysis.sparsity.attention_score:Attention",
    "activation": "sparsecod_megatron.analysis.sparsity.activation:Activation",
}
"""name → module:class, a class that is a `Score` and needs no arguments."""


def find_scores(names: Sequence[str], *, pairs: str | None = None) -> list[Score]:
    """The scores of these names, in this order.

    Args:
        names: keys of `SCORES`.
        pairs: a number of pairs or `adjacent`, for permutation.

    Raises:
        ConfigError: an unknown name, one given twice, or none at all; pairs that are neither, or without permutation.
    """
    if not names:
        raise ConfigError(f"--scores: names no score; give some of {','.join(SCORES)}")
    for index, name in enumerate(names):
        if name not in SCORES:
            raise ConfigError(f"--scores {name}: no such score; give some of {','.join(SCORES)}")
        if name in names[:index]:
            raise ConfigError(f"--scores {name}: given twice; name each score once")
    options = {"permutation": {"pairs": _pairs(pairs, names)}} if pairs is not None else {}
    return [_load(SCORES[name], options.get(name, {})) for name in names]


def _pairs(text: str, names: Sequence[str]) -> int | str:
    if "permutation" not in names:
        raise ConfigError(f"--pairs {text}: only permutation swaps pairs; leave it out, or add permutation to --scores")
    if text != "adjacent" and not (text.isdecimal() and int(text) >= 2):
        raise ConfigError(f"--pairs {text}: give a number of pairs, at least 2, or `adjacent`")
    return text if text == "adjacent" else int(text)


def _load(path: str, options: Mapping[str, Any]) -> Score:
    score: Score = pkgutil.resolve_name(path)(**options)
    return score
