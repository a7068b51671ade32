"""Refuses, in one line each, what cannot run: bounds of single keys, then combinations.

Megatron would refuse most of these too, minutes later, on every rank, with a traceback; some it would not (silent VPP
divergence).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from sparsecod_megatron.config.schema import RunConfig
from sparsecod_megatron.errors import ConfigError


def check_config(config: RunConfig) -> None:
    """Check everything that does not depend on the number of processes.

    Raises:
        ConfigError: the first problem found: key, value, fix.
    """
    for problem in _problems(config):
        raise ConfigError(problem)


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Processes left for data parallelism, after checking that the layout fits them.

    Args:
        config: the run.
        world_size: number of processes.

    Raises:
        ConfigError: the layout does not divide the processes, or the batch does not divide the replicas.
    """
    parallel, train = config.parallel, config.train
    if world_size % parallel.model_parallel_size:
        raise ConfigError(
            f"parallel: tensor × pipeline × context parallel size is {parallel.model_parallel_size}, which does not "
            f"divide "
            f"{world_size} processes; start a multiple of {parallel.model_parallel_size} (--nproc)"
        )
    size = world_size // parallel.model_parallel_size
    expert_model_size = (
        parallel.expert_tensor_size * parallel.expert_model_parallel_size * parallel.pipeline_model_parallel_size
    )
    if world_size % expert_model_size:
        raise ConfigError(
            f"parallel.expert_model_parallel_size: expert tensor × expert × pipeline parallel size is "
            f"{expert_model_size}, which does not "
            f"divide {world_size} processes; start a multiple of {expert_model_size} or lower it"
        )
    step = train.micro_batch_size * size
    if train.global_batch_size % step:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of micro_batch_size × "
            f"data-parallel size "
            f"= {train.micro_batch_size} × {size}; use a multiple of {step}"
        )
    _check_virtual_stages(config, num_microbatches=train.global_batch_size // step)
    return size


def _check_virtual_stages(config: RunConfig, *, num_microbatches: int) -> None:
    parallel = config.parallel
    if parallel.virtual_pipeline_model_parallel_size is None:
        return
    stages = parallel.pipeline_model_parallel_size
    if 0 < num_microbatches % stages < stages:
        raise ConfigError(
            f"train.global_batch_size: gives {num_microbatches} micro-batches a step, but the interleaved schedule "
            f"needs a multiple of "
            f"parallel.pipeline_model_parallel_size={stages}; change global_batch_size or micro_batch_size"
        )


def _problems(config: RunConfig) -> Iterator[str]:
    yield from _bounds(config)
    yield from _model_problems(config)
    yield from _parallel_problems(config)
    yield from _run_problems(config)


def _bounds(section: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(section):
        value, key, limits = getattr(section, item.name), prefix + item.name, item.metadata
        if dataclasses.is_dataclass(value):
            yield from _bounds(value, f"{key}.")
        elif value is None:
            continue
        elif "choices" in limits and value not in limits["choices"]:
            yield f"{key}: {value!r} is not one of {', '.join(limits['choices'])}; choose one of these"
        elif "minimum" in limits and not value >= limits["minimum"]:
            yield f"{key}: {value} is below {limits['minimum']}; raise it"
        elif "maximum" in limits and not value <= limits["maximum"]:
            yield f"{key}: {value} is above {limits['maximum']}; lower it"


def _indivisible(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    if value % by:
        yield f"{key}: {value} is not divisible by {by_key}={by}; change one of them"


def _model_problems(config: RunConfig) -> Iterator[str]:
    model = config.model
    if model.kv_channels is None:
        yield from _indivisible(
            "model.hidden_size", model.hidden_size, "model.num_attention_heads", model.num_attention_heads
        )
    if model.head_dim % 2:
        yield f"model.kv_channels: {model.head_dim} is odd, and rotary embeddings turn pairs; use an even number"
    yield from _indivisible(
        "model.num_attention_heads", model.num_attention_heads, "model.num_query_groups", model.query_groups
    )
    if not model.is_moe:
        return
    experts, chosen = model.num_moe_experts or 0, model.moe_router_topk
    if chosen > experts:
        yield f"model.moe_router_topk: {chosen} is more than model.num_moe_experts={experts}; lower it"
    if chosen == 1 and not model.moe_router_pre_softmax:
        reason = "with moe_router_pre_softmax=false gives every token weight 1 and the router no gradient"
        yield f"model.moe_router_topk: 1 {reason}; set model.moe_router_pre_softmax=true"


def _parallel_problems(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    tp_key, tp = "parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size
    yield from _indivisible("model.num_attention_heads", model.num_attention_heads, tp_key, tp)
    yield from _indivisible("model.num_query_groups", model.query_groups, tp_key, tp)
    yield from _indivisible("model.ffn_hidden_size", model.ffn_hidden_size, tp_key, tp)
    if model.vocab_size is not None:
        yield from _indivisible("model.vocab_size", model.vocab_size, tp_key, tp)
    yield from _indivisible("model.make_vocab_size_divisible_by", model.make_vocab_size_divisible_by, tp_key, tp)
    yield from _pipeline_problems(config)
    yield from _sequence_problems(config)
    yield from _expert_problems(config)


def _pipeline_problems(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    pp_key, stages = "parallel.pipeline_model_parallel_size", parallel.pipeline_model_parallel_size
    vpp_key, chunks = "virtual_pipeline_model_parallel_size", parallel.virtual_pipeline_model_parallel_size
    if "pipeline_model_parallel_layout" in config.megatron:
        return
    if chunks is None:
        yield from _indivisible("model.num_layers", model.num_layers, pp_key, stages)
        return
    if stages == 1:
        yield f"parallel.{vpp_key}: {chunks} needs {pp_key} of at least 2; remove it or raise that"
    yield from _indivisible("model.num_layers", model.num_layers, f"{pp_key} × {vpp_key}", stages * chunks)


def _sequence_problems(config: RunConfig) -> Iterator[str]:
    parallel, length = config.parallel, config.data.seq_length
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    if parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel: true needs tensor_model_parallel_size of at least 2; set it to false"
    pieces = (2 * cp if cp > 1 else 1) * (tp if parallel.sequence_parallel else 1)
    yield from _indivisible(
        "data.seq_length", length, "tensor (with sequence_parallel) × twice the context parallel size", pieces
    )


def _expert_problems(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    ep_key, ep = "parallel.expert_model_parallel_size", parallel.expert_model_parallel_size
    if not model.is_moe:
        if ep > 1:
            yield f"{ep_key}: {ep} needs a mixture of experts; set model.num_moe_experts or {ep_key}=1"
        return
    tp_key, tp = "parallel.tensor_model_parallel_size", parallel.tensor_model_parallel_size
    etp_key, etp = "parallel.expert_tensor_parallel_size", parallel.expert_tensor_size
    yield from _indivisible("model.num_moe_experts", model.num_moe_experts or 0, ep_key, ep)
    yield from _indivisible("model.moe_ffn_hidden_size", model.expert_ffn_hidden_size, etp_key, etp)
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None:
        yield from _indivisible("model.moe_shared_expert_intermediate_size", shared, tp_key, tp)
    if etp != tp and ep == 1:
        trains_wrong = "with one expert group Megatron never sums the gradients of the experts' copies"
        yield f"{etp_key}: {etp}, but {tp_key}={tp}: {trains_wrong}; set {ep_key} above 1 or remove {etp_key}"
    if tp > 1 and not parallel.sequence_parallel:
        yield f"parallel.sequence_parallel: false, but Megatron needs it for experts with {tp_key}={tp}; set it to true"


def _run_problems(config: RunConfig) -> Iterator[str]:
    train, schedule = config.train, config.schedule
    warmup, decay = schedule.lr_warmup_steps, schedule.lr_decay_steps
    if decay is not None and warmup >= decay:
        default = "default: train.train_steps"
        yield f"schedule.lr_warmup_steps: {warmup} is not below lr_decay_steps={decay} ({default}); lower it"
    if train.exit_step is not None and train.exit_step > train.train_steps:
        yield f"train.exit_step: {train.exit_step} is after train.train_steps={train.train_steps}; lower or remove it"
    if config.data.train is not None and config.data.tokenizer is None:
        yield "data.tokenizer: not set; give the directory that `sparsecod data` wrote beside the token files"
