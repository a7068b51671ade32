"""Finds the layouts of a run that fit a number of GPUs and are expected to be fastest, by arithmetic alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsecod_megatron.config import ModelConfig, ParallelConfig, PrecisionConfig, RunConfig, check_config
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.planning.hardware import Gpu
from sparsecod_megatron.planning.layout import Layout, layout_of
from sparsecod_megatron.planning.memory import GIB, rank_memory
from sparsecod_megatron.planning.step_time import StepTime, step_time

HEADROOM = 0.10
"""Share of the memory that a found layout leaves free, for fragmentation and uneven experts."""
RECOMPUTE_KEYS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)


@dataclass(frozen=True)
class Candidate:
    """A layout that passes all checks and fits.

    Attributes:
        overrides: what to add to the command line, as `key=value`.
        memory: bytes of the fullest rank.
        time: what a step is expected to take.
    """

    overrides: list[str]
    memory: int
    time: StepTime

    @property
    def expected_seconds(self) -> float:
        """Seconds of a step: the geometric mean of the range, by which candidates are ranked."""
        return (self.time.seconds.best * self.time.seconds.worst) ** 0.5


def search_layouts(config: RunConfig, gpus: int, gpu: Gpu) -> list[Candidate]:
    """Layouts of the run, the fastest first; micro-batch and global batch stay as they are.

    Tensor × pipeline × context × expert parallel sizes that divide the GPUs, tensor parallelism within a node and with
    sequence parallelism, experts' tensor parallelism as the model's or none, and the kinds of recompute.

    Args:
        config: a checked run whose vocabulary is known; its own layout and recompute do not matter.
        gpus: number of processes.
        gpu: what they run on.

    Raises:
        ConfigError: no layout passes the checks, or none fits.
    """
    found: list[Candidate] = []
    smallest, refusal = math.inf, None
    for parallel in _parallel_sections(config.model, gpus, gpu.per_node):
        for recompute in _recomputes(config.model, config.precision):
            try:
                layout = _layout(config, gpus, parallel, recompute)
            except ConfigError as error:
                refusal = refusal or error
                continue
            memory = max(rank_memory(layout, stage).total for stage in layout.distinct_stages)
            smallest = min(smallest, memory)
            if memory <= (1 - HEADROOM) * gpu.memory_bytes:
                found.append(Candidate(_overrides(config, parallel, recompute), memory, step_time(layout, gpu)))
    if found:
        return sorted(found, key=lambda candidate: candidate.expected_seconds)
    if refusal is not None and math.isinf(smallest):
        raise ConfigError(f"--gpus {gpus}: no layout can run; the simplest one is refused with: {refusal}")
    raise ConfigError(
        f"--gpus {gpus}: no layout fits a {gpu.name} of {gpu.memory_bytes / GIB:.1f} GiB with {HEADROOM:.0%} to spare; "
        f"the smallest needs {smallest / GIB:.1f} GiB: use more GPUs or lower train.micro_batch_size"
    )


def _layout(config: RunConfig, gpus: int, parallel: ParallelConfig, recompute: dict[str, Any]) -> Layout:
    """The run in another layout, checked."""
    others = {key: value for key, value in config.megatron.items() if key not in RECOMPUTE_KEYS}
    tried = dataclasses.replace(config, parallel=parallel, megatron={**others, **recompute})
    check_config(tried)
    return layout_of(tried, gpus)


def _parallel_sections(model: ModelConfig, gpus: int, per_node: int) -> Iterator[ParallelConfig]:
    for tensor in _divisors(min(gpus, per_node)):
        for stages in _divisors(gpus):
            for context in _divisors(gpus):
                if gpus % (tensor * stages * context) or model.num_layers % stages:
                    continue
                for experts in _divisors(model.num_moe_experts or 1):
                    for expert_tensor in (None, 1) if experts > 1 and tensor > 1 else (None,):
                        yield ParallelConfig(
                            tensor_model_parallel_size=tensor,
                            pipeline_model_parallel_size=stages,
                            context_parallel_size=context,
                            expert_model_parallel_size=experts,
                            expert_tensor_parallel_size=expert_tensor,
                            sequence_parallel=tensor > 1,
                        )


def _recomputes(model: ModelConfig, precision: PrecisionConfig) -> Iterator[dict[str, Any]]:
    """None, the selective one that Transformer Engine's modules gain by, and full."""
    yield {}
    if not model.is_moe:
        yield {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    elif precision.fp8_recipe != "delayed":  # which Megatron-Core refuses with these modules
        yield {"recompute_granularity": "selective", "recompute_modules": ["moe_act", "layernorm"]}
    yield {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def _overrides(config: RunConfig, parallel: ParallelConfig, recompute: dict[str, Any]) -> list[str]:
    """Everything that differs from the file."""
    changed = []
    for item in dataclasses.fields(ParallelConfig):
        value = getattr(parallel, item.name)
        if value != getattr(config.parallel, item.name):
            changed.append(f"parallel.{item.name}={_yaml(value)}")
    for key in RECOMPUTE_KEYS:
        if recompute.get(key) != config.megatron.get(key):
            changed.append(f"megatron.{key}={_yaml(recompute.get(key))}")
    return changed


def _yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower()


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
