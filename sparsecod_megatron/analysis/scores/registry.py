"""Scores by name. A score's module is imported when it is asked for, so that one does not wait for the others."""

from __future__ import annotations

import math
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
    "answers": "sparsecod_megatron.analysis.scores.answers:Answers",
    "integrated_gradients": "sparsecod_megatron.analysis.scores.integrated_gradients:IntegratedGradients",
    "token_skip": "sparsecod_megatron.analysis.scores.token_skip:TokenSkip",
    "experts": "sparsecod_megatron.analysis.sparsity.experts:Experts",
    "weights": "sparsecod_megatron.analysis.sparsity.weights:Weights",
    "attention": "sparsecod_megatron.analysis.sparsity.attention_score:Attention",
    "sparse_attention": "sparsecod_megatron.analysis.sparsity.sparse_attention_score:SparseAttentionScore",
    "seer_gate": "sparsecod_megatron.analysis.sparsity.seer_gate_score:SeerGate",
    "activation": "sparsecod_megatron.analysis.sparsity.activation:Activation",
}
"""name → module:class, a class that is a `Score` and needs no arguments."""


LOOKING_AT_ALL_WEIGHTS = ("weights", "activation")
"""Scores that take the weights of all blocks at once; others only call blocks, whose weights may come and go."""
ASKING = ("answers", "integrated_gradients")
"""Scores of a task's items; they need no text."""
TAKING_TASKS = (*ASKING, "token_skip")
"""Those, and scores of text that look at answers too where there is a task."""
BUDGETED = ("sparse_attention", "seer_gate")
"""Scores that take shares of the keys that a query keeps."""


def needs_text(names: Sequence[str]) -> bool:
    """Whether any of the scores is measured on text; where none is named, the default ones are."""
    return not names or any(name not in ASKING for name in names)


def find_scores(
    names: Sequence[str],
    *,
    pairs: str | None = None,
    budgets: Sequence[str] | None = None,
    gate_steps: int | None = None,
    curve_score: str | None = None,
    curve_patterns: Sequence[str] | None = None,
    skip_epsilon: float | None = None,
) -> list[Score]:
    """The scores of these names, in this order.

    Args:
        names: keys of `SCORES`.
        pairs: a number of pairs or `adjacent`, for permutation.
        budgets: shares of the keys, for the scores of sparse attention.
        gate_steps: of training, for seer_gate.
        curve_score: by what the curve of weights prunes.
        curve_patterns: n:m, further points of that curve.
        skip_epsilon: nats, for token_skip.

    Raises:
        ConfigError: an unknown name, one given twice, or none at all; pairs that are neither, or without permutation;
            budgets outside of 0 to 1, or without a score that takes them; steps below 1, or without seer_gate; options
            of the curve without weights; an epsilon below 0, or without token_skip.
    """
    if not names:
        raise ConfigError(f"--scores: names no score; give some of {','.join(SCORES)}")
    for index, name in enumerate(names):
        if name not in SCORES:
            raise ConfigError(f"--scores {name}: no such score; give some of {','.join(SCORES)}")
        if name in names[:index]:
            raise ConfigError(f"--scores {name}: given twice; name each score once")
    options: dict[str, dict[str, Any]] = {}
    if pairs is not None:
        options["permutation"] = {"pairs": _pairs(pairs, names)}
    if budgets is not None:
        options |= {name: {"budgets": _budgets(budgets, names)} for name in BUDGETED}
    if gate_steps is not None:
        if "seer_gate" not in names or gate_steps < 1:
            raise ConfigError(f"--gate-steps {gate_steps}: a number of steps, at least 1, for --scores seer_gate alone")
        options.setdefault("seer_gate", {})["steps"] = gate_steps
    if curve_score is not None or curve_patterns is not None:
        options["weights"] = _curve(curve_score, curve_patterns, names)
    if skip_epsilon is not None:
        if "token_skip" not in names or not 0 <= skip_epsilon < math.inf:
            raise ConfigError(f"--skip-epsilon {skip_epsilon}: nats, at least 0, for --scores token_skip alone")
        options["token_skip"] = {"epsilon": skip_epsilon}
    return [_load(SCORES[name], options.get(name, {})) for name in names]


def _pairs(text: str, names: Sequence[str]) -> int | str:
    if "permutation" not in names:
        raise ConfigError(f"--pairs {text}: only permutation swaps pairs; leave it out, or add permutation to --scores")
    if text != "adjacent" and not (text.isdecimal() and int(text) >= 2):
        raise ConfigError(f"--pairs {text}: give a number of pairs, at least 2, or `adjacent`")
    return text if text == "adjacent" else int(text)


def _curve(score: str | None, patterns: Sequence[str] | None, names: Sequence[str]) -> dict[str, Any]:
    if "weights" not in names:
        raise ConfigError("--curve-score, --curve-pattern: only weights has a curve; add weights to --scores")
    from sparsecod_megatron.analysis.sparsity.cuts import CURVE_SCORES, read_pattern

    if score is not None and score not in CURVE_SCORES:
        raise ConfigError(f"--curve-score {score}: no such score; give one of {', '.join(CURVE_SCORES)}")
    found = [read_pattern(text) for text in patterns or ()]
    return {"curve_score": score or CURVE_SCORES[0], "patterns": found}


def _budgets(texts: Sequence[str], names: Sequence[str]) -> tuple[float, ...]:
    if not set(BUDGETED) & set(names):
        raise ConfigError(
            f"--budgets {','.join(texts)}: only {' and '.join(BUDGETED)} keep shares of keys; leave it out, or add one"
        )
    found = set()
    for text in texts:
        try:
            budget = float(text)
        except ValueError:
            budget = 0.0
        if not 0 < budget <= 1:
            raise ConfigError(f"--budgets {text}: not a share; give numbers above 0, at most 1, such as 0.5,0.1")
        found.add(budget)
    if not found - {1.0}:
        raise ConfigError("--budgets: 1 keeps all keys; give some below 1, such as 0.5,0.1")
    return tuple(sorted(found, reverse=True))


def _load(path: str, options: Mapping[str, Any]) -> Score:
    score: Score = pkgutil.resolve_name(path)(**options)
    return score
