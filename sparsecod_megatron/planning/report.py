"""A plan as text for people, and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparsecod_megatron.config.parameters import ParameterCount
from sparsecod_megatron.files import check_output, replacing_output
from sparsecod_megatron.planning.communication import data_traffic
from sparsecod_megatron.planning.hardware import Gpu, Range
from sparsecod_megatron.planning.layout import Layout
from sparsecod_megatron.planning.memory import GIB, parameter_bytes
from sparsecod_megatron.planning.plan import Plan
from sparsecod_megatron.planning.search import Candidate
from sparsecod_megatron.planning.step_law import step_law

Table = Sequence[Sequence[str]]


def plan_text(plan: Plan) -> str:
    """Sections of aligned lines."""
    count, layout = plan.parameters, plan.layout
    flops = ", ".join(f"{value / 1e9:.3g} G {name}" for name, value in plan.flops.items())
    sections = [
        table(
            [
                [
                    "parameters",
                    f"{count.total:,} ({_parts(count)})",
                ],
                *_tables_row(layout),
                ["FLOPs/token", f"{flops} attention, forward and backward"],
                ["layout", _layout_line(layout, plan.gpu)],
                ["step", _step_line(layout)],
                ["Step Law", step_law(layout.config, count).text],
            ]
        ),
        _memory_table(plan),
        _traffic_table(plan),
        _time_table(plan),
    ]
    return "\n\n".join(sections)


def _tables_row(layout: Layout) -> Table:
    """What mechanisms' tables cost, whose look-ups are free; nothing without any."""
    stages = [
        [(kind, count) for kind, count in layout.stage_parameters(stage) if kind.rows_read is not None]
        for stage in range(layout.stages)
    ]
    if not any(stages):
        return []
    numbers = sum(kind.total * count for kinds in stages for kind, count in kinds)
    read = sum(kind.active * count for kinds in stages for kind, count in kinds)
    held = max(parameter_bytes(layout, kinds) for kinds in stages)
    sent = max(sum(traffic.bytes for traffic in data_traffic(layout, kinds)) for kinds in stages)
    cost = f"{held / GIB:.2f} GiB of a rank with gradients and optimizer, {sent / GIB:.2f} GiB sent in a step"
    return [["looked up", f"{numbers:,} in tables, of which a token reads {read:,}: {cost}"]]


def _parts(count: ParameterCount) -> str:
    live = "" if count.live == count.total else f", {count.live:,} not held at zero"
    return f"{count.active:,} active, {count.embedding:,} in embeddings{live}"


def search_text(candidates: Sequence[Candidate], gpu: Gpu, *, limit: int) -> str:
    """The best few, with what to add to the command line."""
    rows = [["", "step", "MFU", "GiB a rank", "overrides"]]
    for place, found in enumerate(candidates[:limit], start=1):
        overrides = " ".join(f"'{item}'" if "[" in item else item for item in found.overrides)
        rows.append(
            [
                str(place),
                _range(found.time.seconds, "s"),
                _percent(found.time.mfu),
                f"{found.memory / GIB:.1f} of {gpu.memory_bytes / GIB:.1f}",
                overrides or "(as the file says)",
            ]
        )
    return f"{len(candidates)} layouts fit; the fastest, by the middle of the range:\n{table(rows)}"


def plan_json(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes, seconds and operations."""
    layout = plan.layout
    return {
        "gpu": asdict(plan.gpu),
        "gpus": layout.gpus,
        "layout": {
            **asdict(layout.parallel),
            "data_parallel_size": layout.data_parallel,
            "expert_data_parallel_size": layout.expert_data_parallel,
            "num_microbatches": layout.num_microbatches,
        },
        "vocab_size": layout.model.vocab_size,
        "parameters": asdict(plan.parameters),
        "flops_per_token": plan.flops,
        "memory_bytes": [{**memory.parts(), "total": memory.total} for memory in plan.memory],
        "gathered_bytes": plan.gathered,
        "activation_bytes_by_recompute": plan.activations,
        "sent_bytes": [{traffic.group: traffic.bytes for traffic in stage} for stage in plan.traffic],
        "step": asdict(plan.time),
        "step_law": asdict(step_law(layout.config, plan.parameters)),
    }


def search_json(candidates: Sequence[Candidate]) -> list[dict[str, Any]]:
    """All layouts that fit, the fastest first."""
    return [
        {"overrides": found.overrides, "memory_bytes": found.memory, "step": asdict(found.time)} for found in candidates
    ]


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        ConfigError: the path cannot be written.
    """
    check_output(path)
    with replacing_output(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(rows: Table) -> str:
    """Columns aligned to the left, the last one as long as it is."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def _layout_line(layout: Layout, gpu: Gpu) -> str:
    parallel = layout.parallel
    sizes = {
        "tensor": layout.tensor,
        "context": layout.context,
        "data": layout.data_parallel,
        "pipeline": layout.stages,
    }
    line = f"{layout.gpus} {gpu.name}: {_product(sizes)}"
    if layout.chunks > 1:
        line += f" of {layout.chunks} chunks"
    if parallel.expert_model_parallel_size > 1:
        experts = {
            "tensor": parallel.expert_tensor_size,
            "expert": parallel.expert_model_parallel_size,
            "data": layout.expert_data_parallel,
        }
        line += f"; experts {_product(experts)}"
    sequence = "; sequence parallel" if parallel.sequence_parallel else ""
    return f"{line}{sequence}; recompute {layout.recompute.granularity}"


def _product(sizes: dict[str, int]) -> str:
    return " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "one process"


def _step_line(layout: Layout) -> str:
    train, length = layout.config.train, layout.config.data.seq_length
    return (
        f"{layout.num_microbatches} × micro-batches of {train.micro_batch_size} × {length} tokens per rank, "
        f"{train.global_batch_size * length:,} tokens in all"
    )


def _memory_table(plan: Plan) -> str:
    stages = plan.layout.distinct_stages
    heading = [f"stage {stage}" for stage in stages] if plan.layout.stages > 1 else ["GiB"]
    rows = [["memory of a rank, GiB" if plan.layout.stages > 1 else "memory of a rank", *heading]]
    parts = [{**plan.memory[stage].parts(), "total": plan.memory[stage].total} for stage in stages]
    rows += [[f"  {name}", *(f"{part[name] / GIB:.2f}" for part in parts)] for name in parts[0]]
    there = plan.gpu.memory_bytes / GIB
    share = plan.fullest.total / plan.gpu.memory_bytes
    gathered = f"while saving, host memory of the first data-parallel rank: {max(plan.gathered) / GIB:.2f} and more"
    by_recompute = ", ".join(f"{name} {size / GIB:.2f}" for name, size in plan.activations.items())
    by_recompute = f"activations and logits by recompute: {by_recompute}"
    return f"{table(rows)}\n  of {there:.1f} ({share:.0%})\n  {by_recompute}\n  {gathered}"


def _traffic_table(plan: Plan) -> str:
    most = max(plan.traffic, key=lambda stage: sum(traffic.bytes for traffic in stage))
    if not most:
        return "communication: none"
    rows = [["sent by a rank in a step", "ranks", "GiB", "ms at full speed"]]
    rows += [
        [
            f"  {traffic.group}",
            str(traffic.size),
            f"{traffic.bytes / GIB:.2f}",
            f"{1e3 * traffic.seconds(plan.gpu):.0f}",
        ]
        for traffic in most
    ]
    return table(rows)


def _time_table(plan: Plan) -> str:
    time = plan.time
    rows = [["expected step (an estimate)", _range(time.seconds, "s")]]
    rows += [[f"  {name}", _range(seconds, "s")] for name, seconds in time.seconds_by_part.items()]
    low, high = (f"{number:,.0f}" for number in (time.tokens_per_s.worst, time.tokens_per_s.best))
    rows += [["tokens/s", f"{low} … {high}"], ["MFU (full attention, bf16 peak)", _percent(time.mfu)]]
    return table(rows)


def _range(values: Range, unit: str) -> str:
    if unit == "s" and values.worst < 1:
        return _range(Range(1e3 * values.best, 1e3 * values.worst), "ms")
    return f"{values.best:.3g} … {values.worst:.3g} {unit}"


def _percent(values: Range) -> str:
    return f"{100 * values.worst:.0f} … {100 * values.best:.0f} %"
