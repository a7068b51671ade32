"""A checkpoint as a HuggingFace directory, which computes what the checkpoint does or is not written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.checkpoint.effective import EffectiveTensors, effective_config, folded_tensors
from sparsecod_megatron.checkpoint.exported_sparsity import write_sparsity
from sparsecod_megatron.checkpoint.stream import streamed_checkpoint
from sparsecod_megatron.checkpoint.whole import shape_only, whole_model
from sparsecod_megatron.config import ModelConfig, RunConfig
from sparsecod_megatron.errors import ConversionError
from sparsecod_megatron.hf import export_model
from sparsecod_megatron.hf.dead_groups import Narrowed, without_dead_groups
from sparsecod_megatron.hf.export import DEFAULT_SHARD_BYTES
from sparsecod_megatron.hf.families import exported_modules
from sparsecod_megatron.hf.verify import Verification, verify_directory
from sparsecod_megatron.mechanisms.exports import know_extensions
from sparsecod_megatron.seams.mechanism import configured

logger = logging.getLogger("sparsecod")
DEFAULT_SEED = 1234


def export_checkpoint(
    path: Path,
    output: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    digests: bool = True,
    verify: bool = True,
    seed: int = DEFAULT_SEED,
    remove_dead: bool = False,
    tell: Callable[[str], None] = logger.info,
) -> Verification | None:
    """Write a checkpoint's weights with its tokenizer. Local, no process group may be there; needs a selected backend.

    Args:
        path: a run directory or one of its step directories.
        output: the directory to make.
        dtype: number format of the weights.
        max_shard_bytes: largest weight file.
        overwrite: replace a model directory that is there.
        digests: hash the checkpoint's files before they are read.
        verify: compare the logits with Megatron-Core's before the directory takes its name, and write what that found
            into it as `parity.json`.
        seed: seed of the tokens that are compared.
        remove_dead: leave neurons or heads out that the run's mechanisms have pruned, as far as the class can say it.
        tell: called with a line that says what was left out, and what stays as zeros.

    Returns:
        What was found, or None without `verify`.

    Raises:
        CheckpointError: no checkpoint there, or not as it was written.
        ConversionError: a model that HuggingFace cannot express, or whose files compute something else.
    """
    found: list[Verification] = []
    with streamed_checkpoint(path, digests=digests) as source:
        effective = EffectiveTensors(source.tensors, source.config, source.step_dir)
        tensors = folded_tensors(effective, source.config)
        model = effective_config(source.config, source.step_dir).model
        narrowed = _without_dead(source.config, model, tensors, tell) if remove_dead else None
        removed = narrowed.removed if narrowed else {}

        def check(folder: Path) -> None:
            write_sparsity(source.config, effective.context, folder, removed=removed)
            if not verify:
                return
            verification = verify_checkpoint(
                source.step_dir,
                source.config,
                folder,
                exported_as=dtype,
                seq_length=source.config.data.seq_length,
                seed=seed,
                is_narrower=bool(removed),
            )
            verification.publish(folder)
            found.append(verification)

        if not verify:
            _require_plain(source.config.megatron)
        export_model(
            narrowed.model if narrowed else model,
            narrowed.tensors if narrowed else tensors,
            output,
            mechanisms=configured(source.config),
            seq_length=source.config.data.seq_length,
            dtype=dtype,
            tokenizer_dir=source.tokenizer_dir,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
            check=check,
        )
    return found[0] if found else None


def verify_checkpoint(
    step_dir: Path,
    config: RunConfig,
    hf_dir: Path,
    *,
    exported_as: torch.dtype | None,
    seq_length: int,
    seed: int = DEFAULT_SEED,
    is_narrower: bool = False,
) -> Verification:
    """A checkpoint, loaded by Megatron-Core, against a HuggingFace directory. Local, as `whole_model`.

    Args:
        step_dir: the checkpoint.
        config: of the run that made it.
        hf_dir: made from it, or what it was made from.
        exported_as: as `verify_directory`.
        seq_length: longest sequence, in tokens.
        seed: seed of the random tokens.
        is_narrower: as `verify_directory`.

    Raises:
        CheckpointError: it cannot be read.
        ConversionError: as `verify_directory`.
    """
    know_extensions()
    return verify_directory(
        lambda: whole_model(step_dir, select_backend()),
        effective_config(config, step_dir).model,
        hf_dir,
        mechanisms=configured(config),
        exported_as=exported_as,
        seq_length=seq_length,
        generator=torch.Generator().manual_seed(seed),
        is_narrower=is_narrower,
    )


def _without_dead(
    config: RunConfig, model: ModelConfig, tensors: Mapping[str, Tensor], tell: Callable[[str], None]
) -> Narrowed | None:
    """The model without what mechanisms have pruned whole; None if they prune nothing so, or more depends on widths."""
    patterns = {pattern for mechanism in configured(config) if (pattern := mechanism.dead_groups()) is not None}
    if not patterns:
        return None
    if modules := exported_modules(model, configured(config)):
        tell(f"mechanisms.{next(iter(modules))} goes by the model's widths: dead groups stay as zeros")
        return None
    narrowed = without_dead_groups(model, tensors, patterns)
    tell(narrowed.described())
    return narrowed


def _require_plain(megatron: Mapping[str, Any]) -> None:
    """Refuse what `model:` does not express and only the comparison would notice."""
    for key in shape_only(megatron):
        raise ConversionError(
            f"megatron.{key}: can change what the model computes, which only the comparison would notice; "
            "remove --no-verify"
        )
