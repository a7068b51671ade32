"""One cell's numbers by name, from the files that training, analysis and evaluation wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparsecod_megatron.analysis.directory import SCORES_FILE, with_ends
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import ParameterCount, ParameterTable
from sparsecod_megatron.config.run_files import METRICS_FILE, STATISTICS_FILE
from sparsecod_megatron.planning.vocabulary import with_vocabulary
from sparsecod_megatron.studies.block_metrics import block_metrics
from sparsecod_megatron.studies.budget import training_flops_per_token, training_tokens

SIZES = ("parameters_total", "parameters_active", "tokens", "train_flops")
"""What a cell costs, known before it runs."""
LIVED = "mean_live_parameters"
"""What mechanisms that hold weights at zero log: parameters of the whole model that were left, on average so far."""
LIVE = "live_share"
"""What they also log: the share that is left of the weights that may be zero."""
ACTIVATION, RATIO = "activation/sparsity", "activation_ratio"
"""Share of neurons that can be cut, and its complement, which the Sparsing Law is of."""
ANSWERS = ("validation_loss", "answer_accuracy", "knowledge_bits", "bits_per_parameter", "most_bits_per_parameter")
"""What the last validation of a run on `data.synthetic` found, in place of held-out text."""
OVER_TRAINING = ("act_nonzero", "act_small", "load_max_over_mean", "load_entropy")
"""Layer statistics that a study compares by how they change while a run trains, where it collects them."""


def cell_sizes(config: RunConfig) -> dict[str, float]:
    """The numbers of `SIZES`; operations by the convention `full` of config/flops.py."""
    return _sizes(config, _count(config))


def _count(config: RunConfig) -> ParameterCount:
    return ParameterTable.of(with_vocabulary(config)[0]).count()


def _sizes(config: RunConfig, count: ParameterCount) -> dict[str, float]:
    tokens = training_tokens(config)
    flops = tokens * training_flops_per_token(config)
    return dict(zip(SIZES, (count.total, count.active, tokens, flops), strict=True))


def cell_metrics(config: RunConfig, *, run: Path, analysis: Path, evaluation: Path) -> dict[str, float]:
    """Every number of a cell that is finite.

    `SIZES`; `active_share` and `tokens_per_parameter`, of all parameters; `parameters_non_embedding`, and
    `parameters_mean_live`, those of them that were not zero, on average over the steps; `live_share_end`, the share
    that one mechanism of weight sparsity left at the last step of the weights that it may set to zero; `loss`,
    `perplexity` and `bits_per_byte` of held-out text, or `ANSWERS`; `SCORE/VALUE` of every score, and
    `SCORE/VALUE/BLOCK` of those of `block_metrics`; `activation_ratio`, 1 − `activation/sparsity`; `TASK/METRIC` of
    every task and `task_mean`, the mean over tasks of `acc_norm`, or `acc` where a task has none;
    `out_var_first`, `out_var_last` and `out_var_growth` of the last collected step, the last layer's over the first's;
    `NAME_start` and `NAME_end` of every statistic in `OVER_TRAINING`, means over layers at the first and the last
    collected step, and `NAME_end_first` of the first layer that has it; `first_loss`, of the first logged step; the
    median `tokens_per_s`.
    """
    count = _count(config)
    found: dict[str, Any] = {
        **(sizes := _sizes(config, count)),
        "active_share": sizes["parameters_active"] / sizes["parameters_total"],
        "tokens_per_parameter": sizes["tokens"] / sizes["parameters_total"],
        **_variances(run),
        **dict(_over_training(run)),
        **measured_metrics(analysis=analysis, evaluation=evaluation),
    }
    records = _lines(run / METRICS_FILE)
    found |= _non_embedding(count, records[-1] if records else {})
    if config.data.synthetic:
        answered = [record for record in records if "answer_accuracy" in record]
        found |= {name: answered[-1].get(name) for name in ANSWERS} if answered else {}
    found["first_loss"] = next((record["loss"] for record in records if "loss" in record), None)
    speeds = sorted(record["tokens_per_s"] for record in records if "tokens_per_s" in record)
    found["tokens_per_s"] = speeds[len(speeds) // 2] if speeds else None
    return _finite(found)


def measured_metrics(*, analysis: Path, evaluation: Path) -> dict[str, float]:
    """The numbers of scores and held-out text alone, named as in `cell_metrics`."""
    scores = {name: ends["value"] for name, ends in _scores(analysis / SCORES_FILE)}
    return _finite(scores | dict(_evaluated(evaluation / "results.json")))


def measured_intervals(analysis: Path) -> dict[str, tuple[float, float]]:
    """Ends of the 95 % intervals, over sequences, of the scores that have them; named as in `cell_metrics`."""
    found = {name: (ends["low"], ends["high"]) for name, ends in _scores(analysis / SCORES_FILE)}
    return {name: ends for name, ends in found.items() if None not in ends}


def _finite(found: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in found.items() if isinstance(value, int | float) and math.isfinite(value)}


def _non_embedding(count: ParameterCount, last: dict[str, Any]) -> dict[str, float]:
    """Parameters outside of embeddings, how many of them were left on average, and the share left at the end."""
    zeros = sum(count.total - value for name, value in last.items() if name.rpartition("/")[2] == LIVED)
    body = count.total - count.embedding
    found = {"parameters_non_embedding": body, "parameters_mean_live": body - zeros}
    left = [value for name, value in last.items() if name.rpartition("/")[2] == LIVE]
    return {**found, **({f"{LIVE}_end": left[0]} if len(left) == 1 else {})}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def last_variances(run: Path) -> list[float]:
    """`out_var` of every layer at the last collected step; nothing where it was never collected."""
    records = _lines(run / STATISTICS_FILE)
    found = [
        layers for record in records if None not in (layers := [layer.get("out_var") for layer in record["layers"]])
    ]
    return found[-1] if found else []


def _variances(run: Path) -> dict[str, float | None]:
    layers = last_variances(run)
    if not layers:
        return {}
    growth = layers[-1] / layers[0] if layers[0] else None
    return {"out_var_first": layers[0], "out_var_last": layers[-1], "out_var_growth": growth}


def _over_training(run: Path) -> Iterator[tuple[str, float]]:
    records = _lines(run / STATISTICS_FILE)
    for name in OVER_TRAINING:
        collected = [[layer[name] for layer in record["layers"] if name in layer] for record in records]
        layers = [found for found in collected if found]
        if layers:
            yield f"{name}_start", sum(layers[0]) / len(layers[0])
            yield f"{name}_end", sum(layers[-1]) / len(layers[-1])
            yield f"{name}_end_first", layers[-1][0]


def _scores(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Values of all scores with the ends of their intervals; of the activation ratio those of the sparsity from 1."""
    if not path.is_file():
        return
    for score, result in json.loads(path.read_text(encoding="utf-8"))["scores"].items():
        for name, value in result["values"].items():
            ends = with_ends(value)
            yield f"{score}/{name}", ends
            if f"{score}/{name}" == ACTIVATION:
                turned = {"value": ends["value"], "low": ends["high"], "high": ends["low"]}
                yield RATIO, {end: None if number is None else 1 - number for end, number in turned.items()}
        yield from block_metrics(result["tables"])


def _evaluated(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():  # a synthetic task, which has no text
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    text = content.get("perplexity") or {}
    yield from ((name, text.get(name)) for name in ("loss", "perplexity", "bits_per_byte"))
    tasks: dict[str, dict[str, float]] = {}
    for row in content.get("tasks") or []:
        yield f"{row['task']}/{row['metric']}", row["value"]
        tasks.setdefault(row["task"], {})[row["metric"]] = row["value"]
    accuracies = [rows.get("acc_norm", rows.get("acc")) for rows in tasks.values()]
    known = [accuracy for accuracy in accuracies if accuracy is not None]
    if known:
        yield "task_mean", sum(known) / len(known)
