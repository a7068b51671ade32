"""Everything that a plan says about one layout, and whether the layout fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.flops import CONVENTIONS, flops_per_token
from sparsecod_megatron.config.parameters import ParameterCount
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.planning.communication import Traffic, step_traffic
from sparsecod_megatron.planning.hardware import Gpu
from sparsecod_megatron.planning.layout import Layout, layout_of
from sparsecod_megatron.planning.memory import GIB, RankMemory, gathered_optimizer, rank_memory
from sparsecod_megatron.planning.step_time import StepTime, step_time

_RECOMPUTE_OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
_REMEDIES = {
    "weights": "raise parallel.tensor_model_parallel_size, pipeline_model_parallel_size or (experts) "
    "expert_model_parallel_size",
    "optimizer": "use more GPUs, whose data-parallel ranks share it, or raise parallel.tensor_model_parallel_size or "
    "pipeline_model_parallel_size",
    "activations": "lower train.micro_batch_size, set megatron.recompute_granularity=full, or raise "
    "parallel.tensor_model_parallel_size with sequence_parallel, or context_parallel_size",
    "logits": "lower train.micro_batch_size or raise parallel.tensor_model_parallel_size",
}
_REMEDIES["gradients"] = _REMEDIES["weights"]
_REMEDIES["workspace"] = _REMEDIES["logits"]


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it starts.

    Attributes:
        layout: the run and its processes.
        gpu: what it is planned for.
        parameters: parameters of the model.
        flops: operations of one token, forward and backward, by convention.
        memory: memory of a rank of each pipeline stage.
        gathered: bytes that the first data-parallel rank of each stage gathers in host memory for a checkpoint.
        activations: bytes of the rank that has most, logits included, by kind of recompute; `selective` is of the core
            attention.
        traffic: traffic of a rank of each pipeline stage.
        time: time of a step.
    """

    layout: Layout
    gpu: Gpu
    parameters: ParameterCount
    flops: dict[str, float]
    memory: list[RankMemory]
    gathered: list[int]
    activations: dict[str, int]
    traffic: list[list[Traffic]]
    time: StepTime

    @property
    def fullest_stage(self) -> int:
        """The pipeline stage whose ranks need the most memory."""
        return max(range(len(self.memory)), key=lambda stage: self.memory[stage].total)

    @property
    def fullest(self) -> RankMemory:
        """Memory of its ranks."""
        return self.memory[self.fullest_stage]


def make_plan(config: RunConfig, gpus: int, gpu: Gpu) -> Plan:
    """Plan a checked run whose vocabulary is known.

    Raises:
        ConfigError: the layout cannot run on that number of GPUs.
    """
    layout = layout_of(config, gpus)
    length = config.data.seq_length
    stages = range(layout.stages)
    return Plan(
        layout=layout,
        gpu=gpu,
        parameters=layout.table.count(),
        flops={name: flops_per_token(layout.table, length, convention=name) for name in CONVENTIONS},
        memory=[rank_memory(layout, stage) for stage in stages],
        gathered=[gathered_optimizer(layout, stage) for stage in stages],
        activations={name: _activations(config, gpus, recompute) for name, recompute in _RECOMPUTE_OPTIONS.items()},
        traffic=[step_traffic(layout, stage) for stage in stages],
        time=step_time(layout, gpu),
    )


def _activations(config: RunConfig, gpus: int, recompute: dict[str, Any]) -> int:
    """Activations and logits of the rank that has most of them, if the run recomputed like this."""
    others = {key: value for key, value in config.megatron.items() if not key.startswith("recompute_")}
    layout = layout_of(replace(config, megatron={**others, **recompute}), gpus)
    memory = [rank_memory(layout, stage) for stage in layout.distinct_stages]
    return max(rank.activations + rank.logits for rank in memory)


def require_fit(plan: Plan) -> None:
    """Refuse a layout whose fullest rank does not fit.

    Raises:
        ConfigError: names the largest part and what makes it smaller.
    """
    needed, there = plan.fullest.total, plan.gpu.memory_bytes
    if needed <= there:
        return
    part, size = max(plan.fullest.parts().items(), key=lambda item: item[1])
    raise ConfigError(
        f"parallel: a rank of pipeline stage {plan.fullest_stage} needs {needed / GIB:.1f} GiB, but a "
        f"{plan.gpu.name} has {there / GIB:.1f}; the largest part is {part}, {size / GIB:.1f} GiB: {_REMEDIES[part]}; "
        "or let --search find a layout"
    )
