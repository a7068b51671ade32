"""Refuses `megatron:` fields that would not do what they say: training, planning and studies give the same answer."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sparsecod_megatron.config.megatron_fields import (
    ADAM_FIELDS,
    FIELDS_PASSED,
    FP8_FIELDS,
    KEYS_OF_FIELDS,
    LATENT_CONFLICTS,
    MODULES_TO_RECOMPUTE,
    MOE_FIELDS,
    MUON_FIELDS,
    READING_CONDITIONS,
    STAGE_FIELDS,
    TRANSFORMER_ENGINE_FIELDS,
    Kind,
)
from sparsecod_megatron.config.megatron_refused import REFUSALS
from sparsecod_megatron.config.schema import RunConfig

_NAMES: dict[Kind, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a number, or a list of numbers or words",
}


def megatron_problems(config: RunConfig) -> Iterator[str]:
    """One line for each field that is unknown, set elsewhere, refused, of the wrong type or without effect."""
    refused = {field: reason for reason, fields in REFUSALS.items() for field in fields}
    for field, value in config.megatron.items():
        said = f"megatron.{field}: {_shown(value)}"
        if field in KEYS_OF_FIELDS:
            yield f"{said}, but {KEYS_OF_FIELDS[field]} says what it is here; set that instead"
        elif field in refused:
            yield f"{said}, but {refused[field]}; remove it"
        elif field not in FIELDS_PASSED:
            yield f"{said}: no such Megatron-Core field; {_hint(field, [*FIELDS_PASSED, *KEYS_OF_FIELDS, *refused])}"
        elif not _is_of_kind(value, kind := FIELDS_PASSED[field]):
            wanted = _NAMES[kind] if not isinstance(kind, tuple) else f"one of {', '.join(kind)}"
            yield f"{said} is not {wanted}; give one"
        else:
            yield from (f"{said}, but {obstacle}" for obstacle in _obstacles(config, field))


def without_effect(config: RunConfig) -> set[str]:
    """Fields that pass, but that nothing reads in this run, or that would not do what they say."""
    return {field for field in config.megatron if field in FIELDS_PASSED and any(_obstacles(config, field))}


def needs_transformer_engine(field: str) -> str | None:
    """Why a field that passes cannot be used with the reference modules; None if it can."""
    if field not in TRANSFORMER_ENGINE_FIELDS:
        return None
    return "only Transformer Engine reads it, which runs on CUDA where it is installed; remove it here"


def _hint(field: str, known: list[str]) -> str:
    near = difflib.get_close_matches(field, known, n=1)
    return f"did you mean {near[0]!r}?" if near else "docs/PARALLELISM.md lists those that pass"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _is_of_kind(value: Any, kind: Kind) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, str) and value in kind
    if kind is list:
        entries = value if isinstance(value, list) else [value]
        return all(isinstance(entry, int | str) for entry in entries)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _obstacles(config: RunConfig, field: str) -> Iterator[str]:
    """Why a field that passes would have no effect in this run, or another one than it names; None if it works."""
    model, megatron = config.model, config.megatron
    if config.backend == "cpu" and (obstacle := needs_transformer_engine(field)):
        yield obstacle
    if field in READING_CONDITIONS and megatron.get(other := READING_CONDITIONS[field][0]) not in (
        values := READING_CONDITIONS[field][1]
    ):
        yield f"only megatron.{other}={_shown(values[0])} reads it; set that or remove this"
    if field in FP8_FIELDS and not config.precision.fp8:
        yield "precision.fp8_recipe is none; choose a recipe or remove it"
    if field in MUON_FIELDS and config.optimizer.optimizer != "muon":
        yield "optimizer.optimizer is not muon; remove it"
    if field in ADAM_FIELDS and config.optimizer.optimizer != "adam":
        yield "optimizer.optimizer is not adam; remove it"
    if field in MOE_FIELDS:
        yield from _expert_obstacles(config, field)
    if field in STAGE_FIELDS:
        yield from _stage_obstacles(config, field)
    if field == "batch_p2p_comm" and megatron[field] and megatron.get("overlap_p2p_comm"):
        yield "what is batched cannot overlap (megatron.overlap_p2p_comm); set one of them to false"
    if model.multi_latent_attention and field in LATENT_CONFLICTS and megatron[field]:
        yield f"{LATENT_CONFLICTS[field]} (model.multi_latent_attention); remove it"
    if field == "cp_comm_type":
        yield from _context_obstacles(config)
    if field.startswith("recompute_"):
        yield from _recompute_obstacles(megatron, field)
    if field.startswith("cross_entropy_"):
        yield from _loss_obstacles(megatron, config.precision.dtype, field)
    if field == "activation_func_fp8_input_store" and model.activation != "swiglu":
        yield f"model.activation={model.activation} is not swiglu; remove it"
    if field == "use_fused_weighted_squared_relu" and model.activation != "relu2":
        yield f"model.activation={model.activation} is not relu2; remove it"
    if field == "glu_linear_offset" and not model.is_gated:
        yield f"model.activation={model.activation} has no gate to add it to; remove it"
    if field == "glu_linear_offset" and model.activation == "clamped_swiglu":
        yield "model.activation=clamped_swiglu has an offset of 1; remove it"
    if field == "bias_activation_fusion" and megatron[field] and model.activation != "swiglu":
        yield f"only swiglu's fused function is model.activation={model.activation} without bias; set it to false"


def _context_obstacles(config: RunConfig) -> Iterator[str]:
    """What Transformer Engine would refuse in the first forward pass, or never read.

    Source: Transformer Engine pytorch/attention/dot_product_attention/context_parallel.py.
    """
    model, parallel, kind = config.model, config.parallel, config.megatron["cp_comm_type"]
    size, tensor = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if size == 1:
        yield "there is one context-parallel rank; raise parallel.context_parallel_size or remove it"
    elif kind == "p2p" and model.sliding_window is not None:
        yield "a ring has no sliding window (model.sliding_window); use all_gather or a2a"
    elif kind != "a2a" and model.softmax_type != "vanilla":
        yield f"model.softmax_type={model.softmax_type} needs whole heads on each rank; use a2a or remove it"
    elif kind == "a2a" and max(1, model.query_groups // tensor) % size:
        yield f"it deals {model.query_groups} query groups over {tensor} tensor × {size} context ranks; use all_gather"


def _loss_obstacles(megatron: Mapping[str, Any], dtype: str, field: str) -> Iterator[str]:
    fused, kind = megatron.get("cross_entropy_loss_fusion"), megatron.get("cross_entropy_fusion_impl")
    if dtype != "fp32":
        return
    if field == "cross_entropy_fusion_impl" and not fused:
        yield "the loss of fp32 runs is not fused; set megatron.cross_entropy_loss_fusion=true or remove this"
    elif fused and kind != "te":
        # megatron/core/fusions/fused_cross_entropy.py:82
        yield "this fused loss rounds its gradient to bf16, and precision.dtype is fp32; set one of them otherwise"


def _recompute_obstacles(megatron: dict[str, Any], field: str) -> Iterator[str]:
    value = megatron[field]
    if field == "recompute_granularity" and value == "full":
        for needed in ("recompute_method", "recompute_num_layers"):
            if needed not in megatron:
                yield f"megatron.{needed} is not set; give {'uniform or block' if 'method' in needed else 'a number'}"
    if field == "recompute_num_layers" and value < 1:
        yield "full recompute needs a number of at least 1; raise it"
    if field == "recompute_modules":
        strangers = [
            name for name in (value if isinstance(value, list) else [value]) if name not in MODULES_TO_RECOMPUTE
        ]
        if strangers or not isinstance(value, list):
            yield f"it takes a list of {', '.join(MODULES_TO_RECOMPUTE)}; give at least one of them"


def _stage_obstacles(config: RunConfig, field: str) -> Iterator[str]:
    stages, chunks = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size
    if stages == 1:
        yield "there is one pipeline stage; raise parallel.pipeline_model_parallel_size or remove it"
    elif field == "pipeline_model_parallel_layout":
        parts = _unrolled(config.megatron[field]).split("|")
        if len(parts) != stages * (chunks or 1):
            yield (
                f"it has {len(parts)} parts, and parallel.pipeline_model_parallel_size × "
                f"virtual_pipeline_model_parallel_size is {stages * (chunks or 1)}; change one of them"
            )
        elif (count := "".join(parts).count("t")) != config.model.num_layers:
            yield f"it has {count} layers (t), and model.num_layers={config.model.num_layers}; change one of them"


def _unrolled(layout: str) -> str:
    """`(tt|)*2` → `tt|tt|`, `t*3` → `ttt`, without commas.

    Source: Megatron-Core transformer/pipeline_parallel_layer_layout.py:283, `parse_str_to_list`.
    """
    layout = layout.replace(",", "")
    for pattern in (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)"):
        layout = re.sub(pattern, lambda found: found[1] * int(found[2]), layout)
    return layout


def _expert_obstacles(config: RunConfig, field: str) -> Iterator[str]:
    model, parallel, megatron = config.model, config.parallel, config.megatron
    if not model.is_moe:
        yield "the model has no experts; set model.num_moe_experts or remove it"
    if field in ("moe_pad_expert_input_to_capacity", "moe_token_drop_policy") and not model.moe_expert_capacity_factor:
        yield "model.moe_expert_capacity_factor is not set; set it or remove this"
    if field == "moe_shared_expert_overlap" and model.moe_shared_expert_intermediate_size is None:
        yield "there is no shared expert; set model.moe_shared_expert_intermediate_size or remove this"
    if field != "moe_token_dispatcher_type" or megatron[field] != "flex":
        return
    if config.backend == "cpu":
        yield "DeepEP runs on CUDA; use alltoall on the CPU backend"
    if parallel.expert_tensor_size * parallel.expert_model_parallel_size == 1:
        yield "it exchanges tokens between ranks; raise parallel.expert_model_parallel_size or use alltoall"
    if model.moe_router_dtype != "fp32":
        yield f"it takes fp32 probabilities, and model.moe_router_dtype is {model.moe_router_dtype}; set that to fp32"
