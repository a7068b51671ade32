"""Builds the model chunks that this rank holds."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.model.gpt import PreparedGPTModel
from sparsecod_megatron.model.init import initialize
from sparsecod_megatron.model.norms import ProjectionRMSNorm
from sparsecod_megatron.model.placement import stream_norm
from sparsecod_megatron.model.rotary import rotate_by_kind, scale_as_llama3
from sparsecod_megatron.model.sharding import mark_sharded
from sparsecod_megatron.model.shared_layers import share_layers
from sparsecod_megatron.model.specs import block_spec, spec_provider
from sparsecod_megatron.seams.mechanism import configured, token_halo
from sparsecod_megatron.seams.residual import residual_path


def build_model(
    config: RunConfig,
    megatron: TransformerConfig,
    groups: ProcessGroupCollection,
    *,
    device: torch.device,
    transformer_engine: bool,
) -> list[torch.nn.Module]:
    """This rank's model chunks, one unless the schedule is interleaved, freshly initialised. Local.

    Args:
        config: a checked run whose vocab_size is known.
        megatron: `transformer_config(config)`.
        groups: the run's process groups.
        device: where parameters live.
        transformer_engine: as for `transformer_config`.

    Returns:
        GPTModels, each in a Float16Module if the run is bf16.
    """
    assert config.model.vocab_size is not None, "the vocabulary size comes from the tokenizer before the model is built"
    chunks = config.parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = [None] if chunks is None else list(range(chunks))
    provider = spec_provider(config.data, config.parallel, transformer_engine=transformer_engine)
    norm, path = config.model.has_embedding_norm, residual_path(configured(config), config.model)
    build: Any = GPTModel
    factor = config.model.embedding_multiplier
    if norm or path is not None or factor != 1:
        embedding_norm = stream_norm(config.model, provider) if norm else None
        build = partial(PreparedGPTModel, factor=factor, embedding_norm=embedding_norm, path=path)
    table = ParameterTable.of(config)
    models: list[torch.nn.Module] = []
    for vp_stage in stages:
        first = is_pp_first_stage(groups.pp) and is_vp_first_stage(vp_stage, chunks)
        last = is_pp_last_stage(groups.pp) and is_vp_last_stage(vp_stage, chunks)
        spec = block_spec(config, megatron, provider, vp_stage=vp_stage, pp_rank=groups.pp.rank())
        model = build(
            config=megatron,
            transformer_layer_spec=spec,
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.data.seq_length,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=not config.model.untie_embeddings_and_output_weights,
            pg_collection=groups,
            vp_stage=vp_stage,
            **_rotary(config.model),
        ).to(device)
        if config.model.rope_scaling == "llama3" and not config.model.multi_latent_attention:
            scale_as_llama3(model.rotary_pos_emb, config.model)
        rotate_by_kind(model, config.model)
        share_layers(model, table)
        for module in model.modules():
            if isinstance(module, ProjectionRMSNorm):
                module.tp_group = groups.tp
        mark_sharded(model, table, groups)
        initialize(model, table, groups, seed=config.train.seed)
        model.vp_stage, model.token_halo = vp_stage, token_halo(config)
        if transformer_engine and config.megatron.get("gradient_accumulation_fusion", True):
            fuse_weight_gradients(model)
        models.append(Float16Module(megatron, model) if megatron.bf16 else model)
    return models


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's layers add weight gradients to fp32 `main_grad` in the product that makes them. Local.

    A weight that is computed from parameters has no `main_grad`; a layer that computes its own says so.

    Megatron-Core's field for it also asks for apex's extension, for the output layer, which not everybody has.

    Source: Transformer Engine pytorch/module/linear.py; Megatron-Core tensor_parallel/layers.py:924.
    """
    for module in model.modules():
        has_weight = any(name.startswith("weight") for name, _ in module.named_parameters(recurse=False))
        may_fuse = getattr(module, "gradient_accumulation_fusion", True)
        if has_weight and may_fuse and hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]  # torch types attributes as tensors


def _rotary(model: ModelConfig) -> dict[str, Any]:
    """GPTModel's arguments for the rotary embedding; YaRN's numbers go through TransformerConfig.

    Latent attention makes angles of its own, which GPTModel knows of those of type `rope` alone (gpt_model.py:159).
    """
    has_yarn = model.rope_scaling == "yarn" and not model.multi_latent_attention
    return {
        "position_embedding_type": "yarn" if has_yarn else "rope",
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "seq_len_interpolation_factor": model.rope_scaling_factor if model.rope_scaling == "linear" else None,
    }


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The GPTModel inside data-parallel and 16-bit wrappers."""
    while not isinstance(model, GPTModel):
        assert isinstance(model.module, torch.nn.Module), "a wrapper keeps the model it wraps in `module`"
        model = model.module
    return model
