"""What multi-latent attention has no place for; beside `check_model.py`, whose other checks hold for it too."""

from __future__ import annotations

from collections.abc import Iterator

from sparsecod_megatron.config.schema import RunConfig

_SWITCH = "model.multi_latent_attention: true"
_OWN_VALUES = {
    "normalization": ("RMSNorm", "its latents have RMSNorm alone"),
    "qk_norm": (False, "its latents are normalised already"),
    "rotary_percent": (1.0, "qk_pos_emb_head_dim says how many channels rotate"),
    "no_rope_freq": (None, "Megatron-Core's rotates in every layer"),
    "sliding_window": (None, "it has no window"),
    "softmax_scale": (None, "its channels and mscale_all_dim say what scores are multiplied by"),
    "softmax_type": ("vanilla", "it has no sinks"),
    "attention_output_gate": ("none", "Megatron-Core has no gate of it"),
    "qkv_bias": (False, "Megatron-Core's projections of it have none"),
}
"""Key → the only value beside multi-latent attention, and why."""


def latent_problems(config: RunConfig) -> Iterator[str]:
    """One line for each key that multi-latent attention cannot have, and for its own."""
    model = config.model
    if not model.multi_latent_attention:
        return
    for name, (wanted, why) in _OWN_VALUES.items():
        if (value := getattr(model, name)) != wanted:
            yield f"model.{name}: {_shown(value)}, but {_SWITCH}, and {why}; set it to {_shown(wanted)}"
    if model.query_groups != model.num_attention_heads:
        groups, heads = model.query_groups, model.num_attention_heads
        yield f"model.num_query_groups: {groups}, but {_SWITCH}, and every head has keys of its own; use {heads}"
    if model.kv_channels is not None:
        own = "qk_head_dim, qk_pos_emb_head_dim and v_head_dim say how wide heads are"
        yield f"model.kv_channels: {model.kv_channels}, but {_SWITCH}, and {own}; remove it"
    if model.qk_pos_emb_head_dim % 2:
        yield f"model.qk_pos_emb_head_dim: {model.qk_pos_emb_head_dim} is odd, but pairs rotate; use an even number"
    tensor = config.parallel.tensor_model_parallel_size
    if tensor > 1 and not config.parallel.sequence_parallel:
        why = "without it each rank would have the gradient of the shared key from its own heads alone"
        yield f"parallel.sequence_parallel: false, but {_SWITCH} over {tensor} ranks, and {why}; set it to true"


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
