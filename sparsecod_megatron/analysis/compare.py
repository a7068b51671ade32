"""Two analysed models side by side: the difference of each score on the same sequences, and whether it can be told."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsecod_megatron.analysis.directory import AnalysisDirectory, load_analyses
from sparsecod_megatron.analysis.intervals import mean_interval
from sparsecod_megatron.errors import ConfigError


@dataclass(frozen=True)
class Difference:
    """One number of two models, as means over the sequences that both have it for.

    Attributes:
        score: name of the score.
        name: name of its per-sequence number.
        first: mean in the first model.
        second: mean in the second.
        difference: second − first.
        low: lower end of the difference's 95 % interval, from resampling pairs; None for a single pair.
        high: upper end.
        separated: whether the interval leaves zero out.
        num_sequences: pairs.
    """

    score: str
    name: str
    first: float
    second: float
    difference: float
    low: float | None
    high: float | None
    separated: bool
    num_sequences: int


def compare(first: Path, second: Path) -> list[Difference]:
    """Paired differences of every per-sequence number that both analyses hold.

    Args:
        first: analysis directory.
        second: analysis directory of the same sequences.

    Raises:
        DataError: a directory without a readable `scores.json`.
        ConfigError: the two were measured on different sequences, or share no score.
    """
    (ours,), (theirs,) = load_analyses([first]), load_analyses([second])
    found = differences(ours, theirs)
    if not found:
        raise ConfigError(f"--compare {first} {second}: no score is in both; analyse both with the same --scores")
    return found


def differences(first: AnalysisDirectory, second: AnalysisDirectory) -> list[Difference]:
    """The same of analyses that have been read; nothing where no score is in both.

    Raises:
        ConfigError: the two were measured on different sequences.
    """
    for key in ("num_samples", "seq_length", "seed", "sample_sha256", "items_sha256"):
        one, other = first.settings.get(key), second.settings.get(key)
        if one != other:
            raise ConfigError(
                f"{first.path} and {second.path}: measured on different sequences ({key} {one} and {other}); analyse "
                "both with the same --data, --samples, --seq-length, --seed and tokenizer"
            )
    seed = first.settings["seed"]
    return [
        difference
        for score in first.scores
        if score in second.scores
        for difference in _differences(score, first.scores[score], second.scores[score], seed)
    ]


def comparison_json(first: Path, second: Path, differences: list[Difference]) -> str:
    """What `sparsecod analyze --compare` writes."""
    rows = [asdict(difference) for difference in differences]
    return json.dumps({"first": str(first), "second": str(second), "differences": rows}, indent=1) + "\n"


def _differences(score: str, ours: dict[str, Any], theirs: dict[str, Any], seed: int) -> list[Difference]:
    found = []
    for name, values in ours["per_sequence"].items():
        others = theirs["per_sequence"].get(name)
        if others is None or len(others) != len(values):
            continue
        pairs = np.array([pair for pair in zip(values, others, strict=True) if None not in pair], dtype=np.float64)
        if not len(pairs):
            continue
        first, second = pairs.mean(axis=0).tolist()
        interval = mean_interval(pairs[:, 1] - pairs[:, 0], seed=seed).at()
        separated = interval.low is not None and not interval.contains(0.0)
        found.append(
            Difference(score, name, first, second, second - first, interval.low, interval.high, separated, len(pairs))
        )
    return found
