"""Refuses, in one line each, what cannot run: bounds of single keys, then combinations.

Megatron would refuse most of these too, minutes later, on every rank, with a traceback; some it would not (VPP that
diverges silently).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sparsecod_megatron.config.blend import blend_problems
from sparsecod_megatron.config.check_batch import division_problems, ramp_problems
from sparsecod_megatron.config.check_layout import layout_problems
from sparsecod_megatron.config.check_megatron import megatron_problems
from sparsecod_megatron.config.check_model import model_problems
from sparsecod_megatron.config.check_precision import precision_problems
from sparsecod_megatron.config.fields import bound_problems, indivisible
from sparsecod_megatron.config.schema import CheckpointConfig, OptimizerConfig, ProfileConfig, RunConfig, TrainConfig
from sparsecod_megatron.errors import ConfigError

MIN_WINDOW = 8
"""Below this many values a median absolute deviation is mostly chance."""
_MUON_COEFFICIENTS = 5
"""Length of the cycle of Newton-Schulz coefficients that Megatron-Core's Muon goes through."""


def check_config(config: RunConfig) -> None:
    """Check everything that does not depend on the number of processes.

    Raises:
        ConfigError: the first problem found: key, value, fix.
    """
    for problem in _problems(config):
        raise ConfigError(problem)


def with_vocab_size(config: RunConfig, needed: int) -> RunConfig:
    """The run with a vocabulary of `needed` entries, padded, and checked again.

    Raises:
        ConfigError: the layout does not divide it.
    """
    completed = replace(config, model=replace(config.model, vocab_size=config.model.padded_vocab_size(needed)))
    check_config(completed)
    return completed


def data_parallel_size(config: RunConfig, world_size: int) -> int:
    """Processes left for data parallelism, after checking that the layout fits them.

    Args:
        config: the run.
        world_size: number of processes.

    Raises:
        ConfigError: the layout does not divide the processes, or the batch does not divide the replicas.
    """
    parallel = config.parallel
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
    for problem in division_problems(config.train, parallel, size):
        raise ConfigError(problem)
    return size


def _problems(config: RunConfig) -> Iterator[str]:
    yield from bound_problems(config)
    yield from _mechanism_bounds(config.mechanisms)
    yield from megatron_problems(config)
    yield from model_problems(config)
    yield from layout_problems(config)
    yield from precision_problems(config)
    yield from _schedule_problems(config)
    yield from ramp_problems(config.train)
    yield from _optimizer_problems(config.optimizer, config.model.mup_base_hidden_size)
    yield from _run_problems(config)
    yield from _fault_problems(config.train, config.checkpoint)
    yield from _checkpoint_problems(config.checkpoint, config.train.train_steps)
    yield from _profile_problems(config.profile)
    for mechanism in config.mechanisms.values():
        yield from mechanism.problems(config)


def _mechanism_bounds(mechanisms: Mapping[str, Any]) -> Iterator[str]:
    for name, mechanism in mechanisms.items():
        yield from bound_problems(mechanism, f"mechanisms.{name}.")


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    schedule, decay = config.schedule, config.decay_steps
    warmup, last = schedule.lr_warmup_steps, schedule.lr_wsd_decay_steps
    if warmup >= decay:
        default = "default: train.train_steps"
        yield f"schedule.lr_warmup_steps: {warmup} is not below lr_decay_steps={decay} ({default}); lower it"
    if schedule.lr_decay_style != "WSD":
        return
    if last is None:
        yield "schedule.lr_wsd_decay_steps: not set; give the number of steps over which WSD lowers the rate"
    elif warmup + last > decay:
        yield f"schedule.lr_wsd_decay_steps: {last} and {warmup} of warm-up exceed lr_decay_steps={decay}; lower it"


def _run_problems(config: RunConfig) -> Iterator[str]:
    train = config.train
    if train.exit_step is not None and train.exit_step > train.train_steps:
        yield f"train.exit_step: {train.exit_step} is after train.train_steps={train.train_steps}; lower or remove it"
    if config.evaluation.interval and not config.evaluation.tasks:
        yield f"evaluation.tasks: none, but evaluation.interval={config.evaluation.interval}; name one, e.g. [paper]"
    if config.data.train is not None and config.data.tokenizer is None:
        yield "data.tokenizer: not set; give the directory that `sparsecod data` wrote beside the token files"
    for name in ("train", "validation"):
        yield from blend_problems(f"data.{name}", getattr(config.data, name))
    if config.data.synthetic:
        yield from _synthetic_problems(config)


def _synthetic_problems(config: RunConfig) -> Iterator[str]:
    """One line for each key that has no meaning for a synthetic task."""
    data = config.data
    for name in ("prefix", "train", "validation", "tokenizer"):
        if (value := getattr(data, name)) is not None:
            yield f"data.{name}: {value}, but data.synthetic makes the samples; remove one of them"
    for name in ("reset_attention_mask", "reset_position_ids"):
        if getattr(data, name):
            yield f"data.{name}: true, but a sample of data.synthetic is one document; set it to false"
    if config.evaluation.interval:
        yield (
            f"evaluation.interval: {config.evaluation.interval}, but lm-eval's tasks are text, which data.synthetic "
            "does not teach; set it to 0"
        )


def _checkpoint_problems(section: CheckpointConfig, last_step: int) -> Iterator[str]:
    if section.keep_every and not section.keep_last:
        yield f"checkpoint.keep_every: {section.keep_every} changes nothing while keep_last=0 keeps all; set keep_last"
    if section.keep_every and section.save_interval:
        yield from indivisible("checkpoint.keep_every", section.keep_every, "save_interval", section.save_interval)
    wrong = [step for step in section.save_steps if not 1 <= step <= last_step]
    if wrong or len(set(section.save_steps)) < len(section.save_steps):
        yield (
            f"checkpoint.save_steps: {section.save_steps}; give steps from 1 to train.train_steps={last_step}, each "
            "once"
        )
    if section.branch_from is not None and section.init_from is not None:
        yield (
            f"checkpoint.branch_from: {section.branch_from}, but checkpoint.init_from={section.init_from} starts "
            "afresh from weights alone; remove one of them"
        )
    if section.densify and section.init_from is None:
        yield "checkpoint.densify: true, but checkpoint.init_from names no weights; set it, or remove densify"


def _profile_problems(section: ProfileConfig) -> Iterator[str]:
    steps = section.steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        yield f"profile.steps: {steps} is not two steps in order, from 1; give [first, last]"
    for name in ("memory", "layers"):
        if not steps and getattr(section, name):
            yield f"profile.{name}: true, but profile.steps traces none; give [first, last]"
    if steps and not (section.ranks and min(section.ranks) >= 0):
        yield f"profile.ranks: {section.ranks} names no process; give some, from 0"


def _optimizer_problems(section: OptimizerConfig, mup_base: int | None) -> Iterator[str]:
    """One line for each setting that Muon cannot be run with."""
    if section.optimizer != "muon":
        return
    if section.muon_num_ns_steps % _MUON_COEFFICIENTS:
        key = "optimizer.muon_num_ns_steps"
        yield f"{key}: {section.muon_num_ns_steps} is not a multiple of {_MUON_COEFFICIENTS}; use that or a multiple"
    if mup_base is not None:
        key = f"model.mup_base_hidden_size: {mup_base}"
        yield f"{key}, but its learning rates are AdamW's; remove it or set optimizer.optimizer=adam"


def _fault_problems(train: TrainConfig, checkpoint: CheckpointConfig) -> Iterator[str]:
    """One line for each policy for spikes and divergence that could never act."""
    if 0 < train.spike_window < MIN_WINDOW:
        yield f"train.spike_window: {train.spike_window} steps are too few; use at least {MIN_WINDOW}, or 0"
    if train.spike_skip and train.spike_window == 0:
        yield "train.spike_skip: true, but train.spike_window=0 looks for none; set a window, or spike_skip=false"
    if train.on_divergence == "rollback" and checkpoint.save_interval == 0:
        yield (
            "train.on_divergence: 'rollback' has no checkpoint to go back to under checkpoint.save_interval=0; "
            "set an interval, or on_divergence=skip"
        )
