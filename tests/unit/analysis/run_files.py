"""Run directories as `sparsecod train` writes them, with values that are known by formula."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsecod_megatron.config import RunConfig, save_config


def out_var(step: int, layer: int, *, scale: float = 1.0) -> float:
    """Residual variance that grows with depth, and faster the longer the run trains."""
    growth = 0.08 + 0.3 * (1 - math.exp(-step / 300))
    return scale * 4e-4 * (1 + step / 50) * math.exp(growth * layer)


def loss(step: int) -> float:
    """A smooth loss, with a spike at every step that is 7 modulo 500."""
    return 2.5 + 5 * math.exp(-step / 150) + (3.0 if step % 500 == 7 else 0.0)


def write_run(
    path: Path,
    *,
    num_layers: int = 4,
    steps: Sequence[int] = tuple(range(1, 21)),
    tokens_per_step: int = 512,
    scale: float = 1.0,
    num_experts: int | None = None,
    everything: bool = False,
) -> Path:
    """Write one run directory.

    Args:
        path: made with its parents.
        num_layers: rows of each collected step.
        steps: those on both JSONL files.
        tokens_per_step: what `tokens` grows by.
        scale: factor of every variance.
        num_experts: makes it a MoE run, with router statistics.
        everything: all statistics groups, the slow ones at every tenth line; otherwise variances alone.
    """
    path.mkdir(parents=True)
    config = RunConfig()
    config.model.num_layers = num_layers
    config.model.num_query_groups = 4
    config.model.num_moe_experts = num_experts
    config.model.moe_shared_expert_intermediate_size = 96 if num_experts else None
    config.train.train_steps = steps[-1]
    config.parallel.tensor_model_parallel_size = 2
    config.parallel.sequence_parallel = num_experts is not None  # Megatron asks for it
    save_config(config, path / "config.yaml")
    noise = random.Random(f"{path.name}")
    metrics, statistics = [], []
    for number, step in enumerate(steps):
        axis = {"step": step, "tokens": step * tokens_per_step}
        metrics.append({**axis, **_metrics(step, noise, validated=step == steps[-1] or step % 100 == 0)})
        layers = [
            {"layer": layer, **_statistics(step, layer, scale, noise, num_experts, everything, slow=number % 10 == 0)}
            for layer in range(num_layers)
        ]
        statistics.append({**axis, "layers": layers})
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "layer_statistics.jsonl", statistics)
    return path


def write_lines(path: Path, records: Sequence[Any]) -> None:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def _metrics(step: int, noise: random.Random, *, validated: bool) -> dict[str, float]:
    values = {
        "loss": loss(step),
        "lr": 1e-3 * min(1.0, step / 50),
        "grad_norm": 0.4 + 2 / step + 0.1 * noise.random(),
        "tokens_per_s": 52_000 + 900 * noise.random(),
        "tflops": 181 + 3 * noise.random(),
        "step_time_s": 0.31 + 0.01 * noise.random(),
    }
    return {**values, "validation_loss": loss(step) + 0.05} if validated else values


def _statistics(
    step: int, layer: int, scale: float, noise: random.Random, num_experts: int | None, everything: bool, slow: bool
) -> dict[str, Any]:
    variance = out_var(step, layer, scale=scale)
    values: dict[str, Any] = {
        "out_var": variance,
        "attn_var": variance * 0.04 / (1 + layer / 4),
        "mlp_var": variance * 0.12 / (1 + layer / 6),
        "out_rms": math.sqrt(variance),
        "attn_ratio": 0.04 / (1 + layer / 4),
        "mlp_ratio": 0.12 / (1 + layer / 6),
    }
    if num_experts and everything:
        load = [noise.expovariate(1.0) ** 0.5 + 0.2 for _ in range(num_experts)]
        values["tokens_per_expert"] = [round(2048 * share / sum(load)) for share in load]
        values["load_entropy"] = 0.9 + 0.05 * noise.random()
        values["dropped_frac"] = 0.0
    if everything and slow:
        values |= {
            "cos": 0.8 + 0.01 * layer,
            "out_skew": noise.gauss(0, 0.02),
            "out_kurt": 3 + 0.4 * layer,
            "out_top_mass": 0.2 + 0.02 * layer,
            "grad_norm": 0.1 / (1 + layer),
            "update_ratio": 1e-3 / (1 + layer),
            "ref_out_var": variance * 1.1,
            "my_own_number": layer - 3.5,
        }
    return values
