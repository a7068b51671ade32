"""How fast dense-1B trains on one card in each precision, and whether its memory is what `sparsecod plan` says."""

from __future__ import annotations

import math
import statistics

import torch

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.planning import GPUS, make_plan
from sparsecod_megatron.planning.memory import CUDA_CONTEXT, GIB
from tests.helpers.training import trainer_batches
from tools.gpu_bring_up.bench import Bench, Finding, Skipped
from tools.gpu_bring_up.sizes import sizes
from tools.gpu_bring_up.trainers import large_config, timed_steps, trainer_of

VARIANTS = {
    "bf16": (),
    "FP8 blockwise": ("precision.fp8_recipe=blockwise", "precision.fp8_format=e4m3"),
    "bf16, weight gradients fused": ("megatron.gradient_accumulation_fusion=true",),
}
GPU = GPUS["h200"]
MEMORY_TOLERANCE = 0.15
"""Share of the planned bytes."""


def run(bench: Bench) -> None:
    """One variant after another."""
    for name, overrides in VARIANTS.items():
        with bench.check(f"dense-1B, {name}") as found:
            config = large_config(bench.cuda, *overrides)
            if config.precision.fp8:
                bench.require_transformer_engine()
                if not bench.cuda:
                    raise Skipped("FP8 needs a CUDA device")
            _measure(bench, found, config)
        if peak := found.values.get("peak_bytes"):
            with bench.check(f"dense-1B, {name}: memory against plan") as against:
                _against_plan(against, found.values["planned_bytes"], peak)


def _measure(bench: Bench, found: Finding, config: RunConfig) -> None:
    size = sizes(bench.cuda)
    with trainer_of(config, transformer_engine=bench.transformer_engine) as trainer:
        timed = list(timed_steps(trainer, trainer_batches(trainer), size.speed_steps))
        peak = torch.cuda.max_memory_allocated() if bench.cuda else 0
    losses = [loss for loss, _ in timed]
    seconds = statistics.median(seconds for _, seconds in timed[size.speed_warm_up :])
    tokens = config.train.global_batch_size * config.data.seq_length / seconds
    flops = tokens * flops_per_token(ParameterTable.of(config), config.data.seq_length)
    plan = make_plan(config, 1, GPU)
    found.values = {
        "step_s": seconds,
        "tokens_per_s": tokens,
        "tflops": flops / 1e12,
        "mfu": flops / GPU.bf16_flops,
        "peak_bytes": peak,
        "planned_bytes": plan.fullest.total - (CUDA_CONTEXT if bench.cuda else 0),
        "planned_step_s": [plan.time.seconds.best, plan.time.seconds.worst],
        "losses": losses,
    }
    found.figure = (
        f"{1e3 * seconds:.0f} ms a step (plan {1e3 * plan.time.seconds.best:.0f} to "
        f"{1e3 * plan.time.seconds.worst:.0f}), {tokens:,.0f} tokens/s, {flops / 1e12:.0f} TFLOP/s, "
        f"MFU {flops / GPU.bf16_flops:.0%} of bf16's peak"
    )
    if not bench.cuda:
        found.figure = f"{len(losses)} steps of a small model"  # the clock of a rehearsal says nothing
    assert all(map(math.isfinite, losses)), losses
    assert losses[-1] < losses[0], f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def _against_plan(found: Finding, planned: int, peak: int) -> None:
    found.values = {"ratio": peak / planned}
    found.figure = f"{peak / GIB:.1f} GiB at most, {planned / GIB:.1f} planned beside CUDA's own"
    assert abs(peak / planned - 1) < MEMORY_TOLERANCE, found.figure
