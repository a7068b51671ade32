"""Names and whole shapes of a model's tensors, as checkpoints hold them: what both backends must agree on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from sparsecod_megatron.config import load_config
from tests.helpers.megatron import SMALL
from tests.helpers.variants import DENSE, MOE, MOE_SHAPE

Table = dict[str, list[int]]
"""Shape by name."""
FP8 = ("model.hidden_size=64", "model.ffn_hidden_size=96", "precision.dtype=bf16")
VARIANTS: dict[str, tuple[str, ...]] = {
    **DENSE,
    **{f"moe-{name}": (*MOE_SHAPE, *overrides) for name, overrides in MOE.items()},
    "gate-headwise": ("mechanisms.headwise_gate={}",),
    "everything": (*DENSE["everything"], "model.attention_output_gate=none", "mechanisms.headwise_gate={}"),
    "attention-residuals": ("mechanisms.attention_residuals.block_layers=1",),
    "hyper-connections": ("mechanisms.hyper_connections={}", "model.layernorm_scaling=true"),
    "keel": ("mechanisms.keel.state_dtype=fp32",),
    "siamese": ("mechanisms.siamese_norm={}", *MOE_SHAPE),
    "bf16": ("precision.dtype=bf16",),
    "fp8-delayed": (*FP8, "precision.fp8_recipe=delayed"),
    "fp8-blockwise": (*FP8, "precision.fp8_recipe=blockwise"),
}
"""Every variant that the family has, and each kind of precision."""


def tensors(overrides: tuple[str, ...], groups: Any, *, transformer_engine: bool) -> Table:
    """Those of the small model with these overrides, built on the meta device. Local.

    Args:
        overrides: of `SMALL`.
        groups: process groups of one rank.
        transformer_engine: whose layers; FP8 is left out of the configuration without.
    """
    from sparsecod_megatron.checkpoint.native import model_sharded_state
    from sparsecod_megatron.checkpoint.sharded import pieces, sharded_leaves
    from sparsecod_megatron.mechanisms import MECHANISMS
    from sparsecod_megatron.model import build_model, transformer_config

    config = load_config(None, [*SMALL, *overrides], mechanisms=MECHANISMS)
    if not transformer_engine:
        config = replace(config, precision=replace(config.precision, fp8_recipe="none"))
    meta = torch.device("meta")
    with meta:
        megatron = transformer_config(config, transformer_engine=transformer_engine)
        megatron.init_model_with_meta_device = True  # Transformer Engine's modules know the device by its name alone
        models = build_model(config, megatron, groups, device=meta, transformer_engine=transformer_engine)
        state = model_sharded_state(models, groups)
    return {piece.key: list(piece.global_shape) for _, leaf in sharded_leaves(state) for piece in pieces(leaf)}
