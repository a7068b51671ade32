"""From YAML and overrides to a checked RunConfig, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from sparsecod_megatron.config.check import check_config
from sparsecod_megatron.config.mechanism_section import (
    Catalogue,
    named_mechanisms,
    schema_with,
    take_former_keys,
    with_mechanisms,
)
from sparsecod_megatron.config.presets import preset_model
from sparsecod_megatron.config.schema import RunConfig
from sparsecod_megatron.config.typed import Update, merge_typed, read_updates
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.files import write_text


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), *, mechanisms: Catalogue | None = None
) -> RunConfig:
    """Read, merge, type, complete and check one run's configuration. Local: every rank reads the same file.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: `a.b=c` strings, applied in order; text keys take the value as it is typed, others as YAML.
        mechanisms: what may stand in the section of that name (`mechanisms.MECHANISMS`); None takes no such section.

    Returns:
        The configuration with derived values filled in (`vocab_size` may still be None: it needs the tokenizer). The
        keys of `model.preset` lie under those of file and overrides, and are kept in full beside its name.

    Raises:
        ConfigError: unreadable file, unknown key or preset, wrong type, bound, or combination that cannot run.
    """
    updates = read_updates(RunConfig, path, overrides)
    if mechanisms is not None:
        take_former_keys(updates, mechanisms)
    if named := mechanisms and named_mechanisms(updates, mechanisms):
        schema = schema_with(named)
        updates = read_updates(schema, path, overrides)  # again, for now the types of all keys are known
        take_former_keys(updates, mechanisms)
        config = with_mechanisms(merge_typed(schema, [*_preset(updates), *updates]))
    else:
        config = merge_typed(RunConfig, [*_preset(updates), *updates])
        assert not config.mechanisms, "whoever reads a run with mechanisms says which there are"
    _complete(config)
    check_config(config)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; `load_config` reads it back equal."""
    # Of plain values: a structured copy takes longer than all else that starting a small run does.
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config))))


def _preset(updates: Sequence[Update]) -> list[Update]:
    """Model keys of the preset that is named last, to lie under all others; none where none is.

    Raises:
        ConfigError: no such preset, or one named over a file whose own keys leave nothing of it.
    """
    sections = [(where, content.get("model")) for where, content in updates]
    named = [(where, model) for where, model in sections if isinstance(model, dict) and "preset" in model]
    if not named or named[-1][1]["preset"] is None:
        return []
    where, name = named[-1][0], named[-1][1]["preset"]
    if not isinstance(name, str):
        raise ConfigError(f"{where}: model.preset: {name!r} is not a name; give one, e.g. dense-1B")
    preset = preset_model(name)
    file, model = sections[0]
    if isinstance(model, dict) and set(preset) <= set(model) and model.get("preset") != name:
        raise ConfigError(
            f"{where}: {file} sets every model key itself, and keys win over a preset; change the keys, or start from "
            "the file it came from"
        )
    return [Update("model.preset", {"model": preset})]


def _complete(config: RunConfig) -> None:
    """Fill in what follows from other keys, so that config.yaml shows the values used."""
    model = config.model
    model.num_query_groups = model.query_groups
    is_plain = not model.multi_latent_attention
    if is_plain and model.kv_channels is None and model.hidden_size % model.num_attention_heads == 0:
        model.kv_channels = model.head_dim
    if model.is_moe:
        model.moe_ffn_hidden_size = model.expert_ffn_hidden_size
    config.megatron = {field: value for field, value in config.megatron.items() if value is not None}
    data = config.data
    if data.prefix is not None:
        data.train = data.train or f"{data.prefix}_train"
        data.validation = data.validation or f"{data.prefix}_val"
        data.tokenizer = data.tokenizer or f"{data.prefix}_tokenizer"
