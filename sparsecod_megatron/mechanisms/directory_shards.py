"""A HuggingFace directory's tensors as this rank's shards, under any layout, for mechanisms that read another model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import NORM_RENAMES, ParameterTable
from sparsecod_megatron.errors import ConfigError, ConversionError
from sparsecod_megatron.hf.source import HFSource, open_source
from sparsecod_megatron.model.matrices import shards

SAME_KEYS = ("vocab_size", "num_layers", "hidden_size")
"""Keys of the model in which the directory and the run agree."""


def opened_directory(directory: str, config: RunConfig, *, key: str) -> HFSource:
    """A model of the run's layers, width and vocabulary. Local.

    Args:
        directory: of HuggingFace.
        config: of the run.
        key: that names it, for messages.

    Raises:
        ConfigError: it cannot be read, or is of another shape.
    """
    try:
        source = open_source(Path(directory))
    except ConversionError as error:
        raise ConfigError(f"{key}: {error}") from error
    if source.mechanisms:
        names = ", ".join(source.mechanisms)
        raise ConfigError(f"{key}: {directory} computes with {names}; give a model without mechanisms")
    for name in SAME_KEYS:
        theirs, ours = getattr(source.model, name), getattr(config.model, name)
        if theirs != ours:
            raise ConfigError(
                f"{key}: {directory} has {name} {theirs}, the run has model.{name}={ours}; they must agree"
            )
    return source


@torch.no_grad()
def directory_shards(
    source: HFSource, config: RunConfig, models: Sequence[GPTModel], groups: ProcessGroupCollection, *, key: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each parameter and expert bias of the model chunks, and the directory's values for it, one in memory. Local.

    Args:
        source: the directory.
        config: of the models.
        models: chunks of this rank, without wrappers.
        groups: the run's process groups.
        key: as `opened_directory`.

    Raises:
        ConfigError: its tensors are not those of its configuration, or of these models.
    """
    held = _held(config, models, groups)
    try:
        for name, tensor in source.tensors():
            for target, cut in held.pop(name.replace("local_experts.", ""), ()):
                values = cut(tensor.to(target.device))
                if values.shape != target.shape:
                    shapes = f"{list(tensor.shape)} does not give a shard of {list(target.shape)}"
                    raise ConfigError(
                        f"{key}: {source.directory}: {name} of shape {shapes}; give a model of this shape"
                    )
                yield target, values
    except ConversionError as error:
        raise ConfigError(f"{key}: {error}") from error
    if held:
        raise ConfigError(f"{key}: {source.directory} has no {next(iter(held))}, which the run has; give one like it")


def _held(
    config: RunConfig, models: Sequence[GPTModel], groups: ProcessGroupCollection
) -> dict[str, list[tuple[Tensor, Callable[[Tensor], Tensor]]]]:
    """By name in the whole model, what holds it here and how the whole is cut for it."""
    table = ParameterTable.of(config)
    held: dict[str, list[tuple[Tensor, Callable[[Tensor], Tensor]]]] = {}
    for model in models:
        for shard in shards(model, table, groups):
            name = shard.matrix.name
            for fused, plain in NORM_RENAMES.items():
                name = name.replace(fused, plain)
            held.setdefault(name, []).append((shard.parameter, shard.cut))
        for name, buffer in model.named_buffers():
            if (found := re.fullmatch(r"(.*layers\.)(\d+)(\..*expert_bias)", name)) is not None:
                layer = model.decoder.layers[int(found[2])].layer_number - 1
                held.setdefault(f"{found[1]}{layer}{found[3]}", []).append((buffer, lambda whole: whole))
    return held
