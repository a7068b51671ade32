"""The table at the head of the page: what each run is and how far it came."""

from __future__ import annotations

import math
from pathlib import Path

from sparsecod_megatron.analysis.runs import Run, Series
from sparsecod_megatron.config import ModelConfig, ParallelConfig


def run_facts(run: Run) -> list[tuple[str, str]]:
    """Name and value of each fact, the same names in the same order for every run."""
    model, train = run.config.model, run.config.train
    done = max(int(series.steps[-1]) for series in (*run.metrics.values(), *run.layers.values()))
    tokens = max(int(series.tokens[-1]) for series in (*run.metrics.values(), *run.layers.values()))
    return [
        ("Model", run.kind),
        ("Layers", str(model.num_layers)),
        ("Hidden size", f"{model.hidden_size:,}"),
        ("Attention heads / groups", f"{model.num_attention_heads} / {model.query_groups}"),
        ("FFN hidden size", f"{model.expert_ffn_hidden_size if model.is_moe else model.ffn_hidden_size:,}"),
        ("Experts", _experts(model)),
        ("Vocabulary", f"{model.vocab_size:,}" if model.vocab_size else "not recorded"),
        ("Initialisation", f"{model.init}, σ = {model.init_method_std:g}"),
        ("Layout", _layout(run.config.parallel)),
        ("Precision", run.config.precision.dtype),
        ("Sequence × batch", f"{run.config.data.seq_length:,} × {train.global_batch_size:,}"),
        ("Peak learning rate", f"{run.config.optimizer.lr:g} ({run.config.schedule.lr_decay_style})"),
        ("Weight decay", f"{run.config.optimizer.weight_decay:g}"),
        ("Seed", str(train.seed)),
        ("Branched from", " ← ".join(f"{Path(each.run).name} @ {each.step:,}" for each in run.lineage) or "no run"),
        ("Steps", f"{done:,} of {train.train_steps:,}"),
        ("Tokens", f"{tokens:,}"),
        ("Last loss", _last(run.metrics.get("loss"))),
        ("Last validation loss", _last(run.metrics.get("validation_loss"))),
    ]


def _experts(model: ModelConfig) -> str:
    if not model.is_moe:
        return "none"
    shared = model.moe_shared_expert_intermediate_size
    return f"top {model.moe_router_topk} of {model.num_moe_experts}" + (f" + shared {shared:,}" if shared else "")


def _layout(parallel: ParallelConfig) -> str:
    """Sizes greater than one of the model's parallel dimensions; data parallelism takes the rest of the machine."""
    sizes = {
        "TP": parallel.tensor_model_parallel_size,
        "PP": parallel.pipeline_model_parallel_size,
        "VPP": parallel.virtual_pipeline_model_parallel_size or 1,
        "CP": parallel.context_parallel_size,
        "EP": parallel.expert_model_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size or 1,
    }
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    if parallel.sequence_parallel:
        parts.append("SP")
    return " · ".join(parts) or "data parallel only"


def _last(series: Series | None) -> str:
    if series is None:
        return "none"
    value = float(series.values[-1])
    shown = f"{value:.4f}" if math.isfinite(value) else "non-finite"
    return f"{shown} at step {series.steps[-1]:,}"
