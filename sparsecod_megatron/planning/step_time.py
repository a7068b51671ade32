"""How long a step may take: a roofline of matrix products, memory traffic and communication, as a range.

An estimate. It knows nothing of kernel launches, load imbalance of experts, stragglers, data loading or statistics.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from sparsecod_megatron.config.flops import BACKWARD_FACTOR, flops_per_token, keys_per_query
from sparsecod_megatron.config.parameter_kind import ParameterKind
from sparsecod_megatron.planning.activations import kept_after_recompute, last_activations, layer_activations
from sparsecod_megatron.planning.communication import step_traffic
from sparsecod_megatron.planning.hardware import Efficiency, Gpu, Range
from sparsecod_megatron.planning.layout import Layout

_ELEMENTWISE_PASSES = 4
"""How often norms, activations and residual sums read or write each kept byte, forward and backward together."""
_RECOMPUTE_PASSES = 2
"""The same of what is computed again."""
_ADAM_BYTES = 30
"""A step reads gradient, weight and two moments in fp32, and writes three of them and the bf16 weight."""
_GRADIENT_BYTES = 8
"""Zeroing the fp32 gradient, and reading it for its norm."""


@dataclass(frozen=True)
class StepTime:
    """What a step is expected to take.

    Attributes:
        seconds: seconds of one optimizer step.
        mfu: model operations (convention `full`, without recompute) over those of the bf16 peak.
        tokens_per_s: over all GPUs.
        bubble: idle share of the pipeline's time.
        seconds_by_part: seconds of the slowest stage: `compute`, `elementwise`, `communication`, `bubble`, `optimizer`.
    """

    seconds: Range
    mfu: Range
    tokens_per_s: Range
    bubble: float
    seconds_by_part: dict[str, Range]


def step_time(layout: Layout, gpu: Gpu, efficiency: Efficiency | None = None) -> StepTime:
    """Estimate a step: the slowest stage's micro-batches, the pipeline's bubble, then the optimizer.

    Bubble: (stages − 1) / (micro-batches · chunks) of the micro-batches' time.

    Source: Narayanan et al. (arXiv 2104.04473), section 2.2, for the bubble.
    """
    efficiency = efficiency or Efficiency()
    ideal_bubble = (layout.stages - 1) / (layout.num_microbatches * layout.chunks)
    costs = [_stage_cost(layout, stage, gpu) for stage in layout.distinct_stages]
    ends = {}
    for end in ("best", "worst"):
        stages = [cost.seconds_by_part(layout, gpu, efficiency, end) for cost in costs]
        parts = max(stages, key=lambda parts: sum(parts.values()))
        parts["bubble"] = ideal_bubble * (parts["compute"] + parts["elementwise"] + parts["communication"])
        ends[end] = parts
    seconds = Range(sum(ends["best"].values()), sum(ends["worst"].values()))
    tokens = layout.config.train.global_batch_size * layout.config.data.seq_length
    model_flops = flops_per_token(layout.table, layout.config.data.seq_length) * tokens
    peak = gpu.bf16_flops * layout.gpus
    return StepTime(
        seconds=seconds,
        mfu=Range(model_flops / (seconds.best * peak), model_flops / (seconds.worst * peak)),
        tokens_per_s=Range(tokens / seconds.best, tokens / seconds.worst),
        bubble=ideal_bubble / (1 + ideal_bubble),
        seconds_by_part={name: Range(ends["best"][name], ends["worst"][name]) for name in ends["best"]},
    )


@dataclass(frozen=True)
class StageCost:
    """What a step asks of a rank of one pipeline stage.

    Attributes:
        work: work of one micro-batch.
        link_seconds: by group, at the links' full speed, of the step.
        optimizer_bytes: that the optimizer moves in a step.
        optimizer_flops: operations of Muon in a step.
    """

    work: Work
    link_seconds: dict[str, float]
    optimizer_bytes: float
    optimizer_flops: float

    def seconds_by_part(self, layout: Layout, gpu: Gpu, efficiency: Efficiency, end: str) -> dict[str, float]:
        """Without the bubble, at the `best` or the `worst` end of the ranges."""

        def at(bounds: Range) -> float:
            return bounds.best if end == "best" else bounds.worst

        work, fp8 = self.work, gpu.fp8_flops * at(efficiency.fp8)
        dense = work.dense / gpu.bf16_flops + work.dense_fp8 / fp8
        grouped = work.grouped / gpu.bf16_flops + work.grouped_fp8 / fp8
        attention = work.attention / gpu.bf16_flops
        compute = (
            dense / at(efficiency.matmul)
            + grouped / at(efficiency.grouped_matmul)
            + attention / at(efficiency.attention)
        )
        bandwidth = gpu.memory_bandwidth * at(efficiency.memory)
        links = sum(seconds * at(efficiency.exposed(group)) for group, seconds in self.link_seconds.items())
        orthogonalisation = self.optimizer_flops / (gpu.bf16_flops * at(efficiency.matmul))
        return {
            "compute": compute * layout.num_microbatches,
            "elementwise": work.elementwise_bytes * layout.num_microbatches / bandwidth,
            "communication": links / at(efficiency.link),
            "optimizer": self.optimizer_bytes / bandwidth + orthogonalisation,
        }


def _stage_cost(layout: Layout, stage: int, gpu: Gpu) -> StageCost:
    return StageCost(
        work=microbatch_work(layout, stage),
        link_seconds={traffic.group: traffic.seconds(gpu) for traffic in step_traffic(layout, stage)},
        optimizer_bytes=_optimizer_bytes(layout, stage),
        optimizer_flops=_orthogonalisation(layout, stage),
    )


@dataclass
class Work:
    """What one micro-batch costs one rank, forward, backward and recompute.

    Attributes:
        dense: operations of dense matrix products in bf16.
        dense_fp8: the same in FP8.
        grouped: products of experts in bf16.
        grouped_fp8: the same in FP8.
        attention: products of scores and weighted values.
        elementwise_bytes: read and written by everything else.
    """

    dense: float = 0.0
    dense_fp8: float = 0.0
    grouped: float = 0.0
    grouped_fp8: float = 0.0
    attention: float = 0.0
    elementwise_bytes: float = 0.0


def microbatch_work(layout: Layout, stage: int) -> Work:
    """Work of a rank of pipeline stage `stage` on one micro-batch. Attention skips masked blocks (`windowed`)."""
    work = Work()
    counts: Counter[tuple[int, bool]] = Counter()
    for chunk in range(layout.chunks):
        units, whole = layout.recompute.units(layout.layers(stage, chunk))
        counts.update((layout.representatives[layer], True) for unit in units for layer in unit)
        counts.update((layout.representatives[layer], False) for layer in whole)
    for (layer, recomputed), count in counts.items():
        _add_layers(work, layout, layer, count, recomputed=recomputed)
    if stage == layout.stages - 1:
        for kind in layout.table.last(shares_embedding=False):
            work.dense += BACKWARD_FACTOR * _forward_flops(layout, kind, layer=-1)
        work.elementwise_bytes += _ELEMENTWISE_PASSES * last_activations(layout)["logits"]
    return work


def _add_layers(work: Work, layout: Layout, layer: int, count: int, *, recomputed: bool) -> None:
    """Add `count` layers like `layer`, whose forward pass is done again if they are recomputed."""
    model, modules = layout.model, layout.recompute.modules
    again_of = {
        "mlp": "mlp" in modules,
        "expert": "moe" in modules,
        "shared_expert": "moe" in modules or "shared_experts" in modules,
        "router": "moe" in modules,
    }
    fp8 = layout.in_fp8(layer)
    for kind in layout.table.layer(layer):
        repeated = any(value for family, value in again_of.items() if kind.name.startswith(family))
        passes = BACKWARD_FACTOR + (recomputed or repeated)
        flops = count * passes * _forward_flops(layout, kind, layer)
        if kind.split == "expert":
            work.grouped_fp8 += flops if fp8 else 0
            work.grouped += 0 if fp8 else flops
        else:
            work.dense_fp8 += flops if fp8 and kind.fp8 else 0
            work.dense += 0 if fp8 and kind.fp8 else flops
    keys = keys_per_query(model, layer, layout.config.data.seq_length, convention="windowed")
    channels = model.score_channels + model.value_channels
    attention = 2.0 * layout.tokens * model.num_attention_heads * channels / layout.tensor * keys
    work.attention += count * attention * (BACKWARD_FACTOR + (recomputed or "core_attn" in modules))
    saved = layer_activations(layout, layer)
    total = sum(saved.values())
    again = total if recomputed else total - sum(kept_after_recompute(layout, layer, saved).values())
    work.elementwise_bytes += count * (_ELEMENTWISE_PASSES * total + _RECOMPUTE_PASSES * again)


def _forward_flops(layout: Layout, kind: ParameterKind, layer: int) -> float:
    """Matrix products of one micro-batch on one rank."""
    if not kind.multiplied:
        return 0.0
    if kind.split == "expert":
        one_copy = kind.multiplied // kind.used // layout.parallel.expert_tensor_size
        return 2.0 * one_copy * layout.expert_rows(layer)
    if kind.split == "tensor":
        return 2.0 * kind.multiplied / layout.tensor * layout.tokens
    return 2.0 * kind.multiplied * layout.norm_tokens


def _optimizer_bytes(layout: Layout, stage: int) -> float:
    sharded = layout.config.optimizer.optimizer == "adam"
    total = 0.0
    for kind, count in layout.stage_parameters(stage):
        held = count * layout.on_rank(kind)
        total += held * (_GRADIENT_BYTES + _ADAM_BYTES / (layout.replicas(kind) if sharded else 1))
    return total


def _orthogonalisation(layout: Layout, stage: int) -> float:
    """Muon's operations: each Newton-Schulz step of an m × n matrix, m ≤ n, has products of 4 m² n + 2 m³.

    Source: Jordan et al., Muon (2024).
    """
    section = layout.config.optimizer
    if section.optimizer != "muon":
        return 0.0
    total = 0.0
    for kind, count in layout.stage_parameters(stage):
        if not kind.is_orthogonalised:
            continue
        small, large = sorted(kind.shape)
        copies = count * kind.copies / (layout.parallel.expert_model_parallel_size if kind.split == "expert" else 1)
        total += copies * section.muon_num_ns_steps * (4.0 * small**2 * large + 2.0 * small**3)
    return total
