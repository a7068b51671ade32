"""The configuration's own architecture made small enough to step under dozens of layouts in a few minutes.

Every variant and mechanism stays; only sizes shrink. They are chosen so that each layout has something to go wrong
with: four layers make two pipeline stages of two chunks, two divides heads, widths and experts, and the matrices'
numbers of elements are not multiples of 128, so that buckets of gradients end with padding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sparsecod_megatron.backend.precision_support import check_precision
from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.check_megatron import needs_transformer_engine
from sparsecod_megatron.config.megatron_fields import FIELDS_PASSED, STAGE_FIELDS
from sparsecod_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    IntervalConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ScheduleConfig,
    StatisticsConfig,
    TrainConfig,
)
from sparsecod_megatron.errors import ConfigError

STEPS = 3
"""Optimizer steps of a row."""
MIDDLE = 2
"""Step after which a row saves, resumes or validates."""
LAYERS, SEQUENCE, VOCABULARY, EXPERTS = 4, 32, 192, 8
_STEP_INTERVAL = IntervalConfig(interval=1)
_FIELDS_OF_ROWS = {
    *STAGE_FIELDS,
    "align_param_gather",
    "batch_p2p_comm",
    "batch_p2p_sync",
    "bucket_size",
    "cp_comm_type",
    "distribute_saved_activations",
    "microbatch_group_size_per_vp_stage",
    "overlap_grad_reduce",
    "overlap_p2p_comm",
    "overlap_p2p_comm_warmup_flush",
    "overlap_param_gather",
    "pad_buckets_for_high_nccl_busbw",
    "moe_input_jitter_eps",
    *(field for field in FIELDS_PASSED if field.startswith(("cpu_offloading", "recompute_"))),
}
"""`megatron:` fields of a layout, its communication or memory, and one whose random numbers belong to the layout."""


@dataclass(frozen=True)
class Small:
    """A small run.

    Attributes:
        config: one process, fp32 or as configured.
        notes: what of the original could not be kept, one sentence each.
    """

    config: RunConfig
    notes: tuple[str, ...]


def small_run(config: RunConfig, *, capability: tuple[int, int] | None) -> Small:
    """The same architecture, optimizer, schedule and `megatron:` fields in small. Local.

    Args:
        config: a checked run; neither its data nor its layout is used.
        capability: compute capability of the GPU; None is a CPU. What is configured in an FP8 that it does not have
            trains in bf16.
    """
    notes = []
    if config.model.hidden_dropout or config.model.attention_dropout:
        notes.append("dropout is 0: its masks belong to the layout")
    precision = config.precision
    try:
        check_precision(precision, capability=capability)
    except ConfigError:
        notes.append(
            f"precision.fp8_recipe={precision.fp8_recipe} is not available on this device; rows are in bf16 instead"
        )
        precision = PrecisionConfig(dtype=precision.dtype)
    left = [key for key in config.megatron if key in _FIELDS_OF_ROWS]
    lacking = [key for key in config.megatron if capability is None and needs_transformer_engine(key)]
    notes += [f"megatron.{key} is left out: rows choose communication and memory" for key in left]
    notes += [f"megatron.{key} is left out: it needs Transformer Engine, and this is a CPU" for key in lacking]
    model = _model(config)
    small = RunConfig(
        model=model,
        parallel=ParallelConfig(),
        precision=_few_layers(precision),
        data=DataConfig(
            seq_length=SEQUENCE,
            reset_attention_mask=config.data.reset_attention_mask,
            reset_position_ids=config.data.reset_position_ids,
        ),
        optimizer=_optimizer(config.optimizer),
        schedule=_schedule(config.schedule),
        train=TrainConfig(
            train_steps=STEPS,
            global_batch_size=8,
            micro_batch_size=2,
            seed=config.train.seed,
            eval_interval=0,
            eval_steps=1,
        ),
        # Without spikes: g²/v̂ is largest where v̂ is rounding.
        statistics=StatisticsConfig(
            variance=_STEP_INTERVAL,
            moments=_STEP_INTERVAL,
            norms=_STEP_INTERVAL,
            router=_STEP_INTERVAL,
            mechanisms=_STEP_INTERVAL,
        ),
        mechanisms={name: mechanism.made_small(config.model, model) for name, mechanism in config.mechanisms.items()},
        checkpoint=CheckpointConfig(save_interval=0),
        evaluation=EvaluationConfig(),
        logging=LoggingConfig(),
        backend="cpu" if capability is None else "cuda",
        cpu_kernels=config.cpu_kernels,
        megatron={
            key: _per_layer(value, config.model.num_layers)
            for key, value in config.megatron.items()
            if key not in (*left, *lacking)
        },
    )
    return Small(small, tuple(notes))


def _model(config: RunConfig) -> ModelConfig:
    model = config.model
    heads = min(model.num_attention_heads, 4)
    groups = {model.num_attention_heads: heads, 1: 1}.get(model.query_groups, max(1, heads // 2))
    channels, usual = (16, 16) if config.precision.fp8 else (24, 24)
    attention, width = model.num_attention_heads * model.head_dim, model.hidden_size
    if attention != width:
        channels = usual * 2 if attention > width else 16 if usual == 24 else 8
    hidden = heads * usual
    ffn, expert, shared = (96, 64, 64) if config.precision.fp8 else (90, 42, 54)
    small = replace(
        model,
        preset=None,
        num_layers=LAYERS,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=None if model.multi_latent_attention else channels,
        vocab_size=VOCABULARY,
        make_vocab_size_divisible_by=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        mix_post_fraction=_share_of_layers(model),
        no_rope_freq=model.no_rope_freq and _few(model.no_rope_freq),
        mup_base_hidden_size=model.mup_base_hidden_size and max(1, round(hidden / model.width_ratio)),
        **_positions(model, config.data.seq_length),
        **_latents(model),
    )
    if not model.is_moe:
        return small
    return replace(
        small,
        **_experts(model),
        moe_ffn_hidden_size=expert,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size and shared,
    )


def _latents(model: ModelConfig) -> dict[str, Any]:
    """Widths of latent attention, no two alike, of multiples that FP8 takes."""
    if not model.multi_latent_attention:
        return {}
    widths = {"kv_lora_rank": 32, "qk_head_dim": 32, "qk_pos_emb_head_dim": 16, "v_head_dim": 16}
    return widths | {"q_lora_rank": model.q_lora_rank and 48}


def _share_of_layers(model: ModelConfig) -> float:
    """`mix_post_fraction`, but at least one layer of the small model and not all where the large one mixes."""
    if model.norm_placement != "mix" or not 0 < model.mix_post_fraction < 1:
        return model.mix_post_fraction
    return min(max(model.mix_post_fraction, 1 / LAYERS), 1 - 1 / LAYERS)


def _positions(model: ModelConfig, length: int) -> dict[str, Any]:
    """Windows and original lengths in the same proportion to the sequence."""
    fields: dict[str, Any] = {}
    if model.sliding_window is not None:
        fields["sliding_window"] = max(2, round(SEQUENCE * min(1.0, model.sliding_window / length)))
    if model.window_attn_skip_freq is not None:
        fields["window_attn_skip_freq"] = min(model.window_attn_skip_freq, LAYERS)
    if model.rope_scaling == "yarn":
        original = model.rope_original_max_position_embeddings
        fields["rope_original_max_position_embeddings"] = max(4, round(SEQUENCE * original / length))
    return fields


def _experts(model: ModelConfig) -> dict[str, Any]:
    """At most eight experts, in at most four groups; as many a token as before, but not more than half of them."""
    experts = min(model.num_moe_experts or 1, EXPERTS)
    groups, group_topk = model.moe_router_num_groups, model.moe_router_group_topk
    if groups is not None and group_topk is not None and experts < (model.num_moe_experts or 1):
        groups, group_topk = min(groups, 4), min(group_topk, 2)
    most = max(group_topk or 1, experts // 2)
    per_layer = model.moe_router_topk_per_layer
    return {
        "num_moe_experts": experts,
        "moe_router_topk": min(model.moe_router_topk, most),
        "moe_router_topk_per_layer": per_layer and [min(count, most) for count in _few(per_layer)],
        "moe_router_num_groups": groups,
        "moe_router_group_topk": group_topk,
        "moe_first_k_dense_layers": min(model.moe_first_k_dense_layers, 1),
    }


def _few(values: list[Any]) -> list[Any]:
    """One value for each small layer, evenly spaced over those of the large model, first and last among them."""
    return [values[index * (len(values) - 1) // (LAYERS - 1)] for index in range(LAYERS)]


def _per_layer(value: Any, layers: int) -> Any:
    return _few(value) if isinstance(value, list) and len(value) == layers else value


def _few_layers(precision: PrecisionConfig) -> PrecisionConfig:
    return replace(
        precision,
        num_layers_at_start_in_bf16=min(precision.num_layers_at_start_in_bf16, 1),
        num_layers_at_end_in_bf16=min(precision.num_layers_at_end_in_bf16, 1),
    )


def _optimizer(section: OptimizerConfig) -> OptimizerConfig:
    """The same, but for an epsilon of the order of the gradient.

    With Adam's usual one, an element whose gradient is rounding noise moves by the sign of the noise, and layouts that
    are right part after the first step.
    """
    return replace(section, adam_eps=max(section.adam_eps, 1e-3))


def _schedule(section: ScheduleConfig) -> ScheduleConfig:
    return replace(
        section,
        lr_warmup_steps=min(section.lr_warmup_steps, 1),
        lr_decay_steps=STEPS,
        lr_wsd_decay_steps=section.lr_wsd_decay_steps and 1,
    )
