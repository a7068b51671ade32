"""From YAML and overrides to a checked RunConfig, and back.

OmegaConf merges and types; this file turns its exceptions into one line that names the key, the value and the fix.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sparsecod_megatron.config.check import check_config
from sparsecod_megatron.config.presets import preset_model
from sparsecod_megatron.config.schema import RunConfig
from sparsecod_megatron.errors import ConfigError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, merge, type, complete and check one run's configuration. Local: every rank reads the same file.

    Args:
        path: a YAML file; None starts from the defaults.
        overrides: `a.b=c` strings, applied in order; values are parsed as YAML.

    Returns:
        The configuration with derived values filled in (`vocab_size` may still be None: it needs the tokenizer). The
        keys of `model.preset` lie under those of file and overrides, and are kept in full beside its name.

    Raises:
        ConfigError: unreadable file, unknown key or preset, wrong type, bound, or combination that cannot run.
    """
    updates: list[tuple[str, dict[str, Any]]] = []
    if path is not None:
        updates.append((str(path), _read_yaml(Path(path))))
    updates += [(f"override {override!r}", _parse_override(override)) for override in overrides]
    merged = OmegaConf.structured(RunConfig)
    preset = _preset(updates)
    if preset:
        merged = _merge(merged, OmegaConf.create({"model": preset}), where="model.preset")
    for where, content in updates:
        merged = _merge(merged, _create(content, where=where), where=where)
    try:
        config = cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path or 'overrides'}: {error.full_key}: {_first_line(error)}; fix the value") from None
    _complete(config)
    check_config(config)
    return config


def save_config(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; `load_config` reads it back equal."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _read_yaml(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give the path of a YAML configuration (see examples/configs)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a readable UTF-8 YAML file") from None
    content = _parse(text, where=str(path), fix="fix the file")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not sections; start with `model:`, `train:`, …")
    return content


def _parse(text: str, *, where: str, fix: str) -> Any:
    """One YAML document as plain values, numbers like `1e-4` among them."""
    try:
        return _floats(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or _first_line(error)
        raise ConfigError(f"{where}{line}: not valid YAML ({problem}); {fix}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deep, or an anchor that holds itself; write the values out") from None
    except ValueError as error:  # what looks like a date or a number to YAML and is none
        raise ConfigError(f"{where}: not valid YAML ({_first_line(error)}); {fix}") from None


def _parse_override(override: str) -> dict[Any, Any]:
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise ConfigError(f"override {override!r}: not of the form section.key=value, e.g. optimizer.lr=3e-4")
    content = _parse(value, where=f"override {override!r}", fix="quote the value")
    for name in reversed(key.split(".")):
        content = {name: content}
    return content


def _preset(updates: Sequence[tuple[str, dict[Any, Any]]]) -> dict[str, Any]:
    """Model keys of the preset that is named last; none where none is.

    Raises:
        ConfigError: no such preset, or one named over a file whose own keys leave nothing of it.
    """
    sections = [(where, content.get("model")) for where, content in updates]
    named = [(where, model) for where, model in sections if isinstance(model, dict) and "preset" in model]
    if not named or named[-1][1]["preset"] is None:
        return {}
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
    return preset


def _create(content: dict[Any, Any], *, where: str) -> DictConfig:
    """Typed later, by the merge; checked here to consist of sections."""
    for section, kind in typing.get_type_hints(RunConfig).items():
        value = content.get(section, {})
        if (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict) and not isinstance(value, dict):
            raise ConfigError(
                f"{where}: {section}: {value!r} is not a section; write keys under it, as in examples/configs"
            )
    try:
        return OmegaConf.create(content)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}; fix the value") from None


def _floats(content: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string; every user means the number."""
    if isinstance(content, dict):
        return {str(key): _floats(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_floats(value) for value in content]
    if isinstance(content, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", content):
        return float(content)
    return content


def _merge(base: Any, update: DictConfig, *, where: str) -> Any:
    try:
        return OmegaConf.merge(base, update)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        raise ConfigError(f"{where}: unknown key {key!r}; {_suggest(key)}") from None
    except ValidationError as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}: {key}{_first_line(error)}; give a value of that type") from None
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}; fix the value") from None


def _suggest(key: str) -> str:
    """Names the nearest key, or where a Megatron field goes."""
    section, _, leaf = key.rpartition(".")
    known = known_keys()
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75) or [
        other for other in known if other.rpartition(".")[2] == leaf
    ]
    if near:
        return f"did you mean {near[0]!r}?"
    siblings = sorted(other for other in known if other.rpartition(".")[0] == section)
    return f"keys of {section or 'the file'}: {', '.join(siblings)}; other Megatron fields go under `megatron:`"


def known_keys(schema: type = RunConfig, prefix: str = "") -> list[str]:
    """Dotted names of all sections and keys, those below `megatron` excepted."""
    keys = []
    for name, kind in typing.get_type_hints(schema).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys.extend(known_keys(cast(type, kind), f"{prefix}{name}."))
    return keys


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _complete(config: RunConfig) -> None:
    """Fill in what follows from other keys, so that config.yaml shows the values used."""
    model = config.model
    model.num_query_groups = model.query_groups
    if model.kv_channels is None and model.hidden_size % model.num_attention_heads == 0:
        model.kv_channels = model.head_dim
    if model.is_moe:
        model.moe_ffn_hidden_size = model.expert_ffn_hidden_size
    if config.schedule.lr_decay_steps is None:
        config.schedule.lr_decay_steps = config.train.train_steps
    data = config.data
    if data.prefix is not None:
        data.train = data.train or f"{data.prefix}_train"
        data.validation = data.validation or f"{data.prefix}_val"
        data.tokenizer = data.tokenizer or f"{data.prefix}_tokenizer"
