"""Typed values from YAML and `a.b=c` overrides: what a run's file and a study's file have in common.

OmegaConf merges and types; this file turns its exceptions into one line that names the key, the value and the fix.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from sparsecod_megatron.config.fields import field_types
from sparsecod_megatron.config.megatron_fields import FIELDS_PASSED
from sparsecod_megatron.config.yaml_values import hint_of, parse_value, parse_yaml
from sparsecod_megatron.errors import ConfigError

Schema = TypeVar("Schema")


class Update(NamedTuple):
    """Keys that replace earlier ones.

    Attributes:
        where: what they came from, for messages.
        content: sections as plain values.
    """

    where: str
    content: dict[Any, Any]


def read_updates(schema: type, path: str | Path | None, overrides: Sequence[str]) -> list[Update]:
    """A file's keys, then each override's.

    Args:
        schema: what the keys are of; its types decide which values are text.
        path: a YAML file; None reads none.
        overrides: `a.b=c` strings, in order; values of text keys are taken as they are, others are parsed as YAML.

    Raises:
        ConfigError: unreadable file, text that is not YAML, or a key that stands twice in the file.
    """
    updates = [] if path is None else [Update(str(path), _read_yaml(schema, Path(path)))]
    return updates + [Update(f"override {override!r}", _parse_override(schema, override)) for override in overrides]


def merge_typed(schema: type[Schema], updates: Sequence[Update]) -> Schema:
    """The schema's defaults with the updates over them, each of the type its field has.

    Args:
        schema: a dataclass of dataclasses.
        updates: in order; later ones win.

    Raises:
        ConfigError: unknown key, wrong type, or a required key that is missing.
    """
    created = [_create(schema, content, where=where) for where, content in updates]
    try:
        # Not `merge`, which copies all of the base first.
        merged: Any = OmegaConf.unsafe_merge(copy.deepcopy(_defaults(cast(type, schema))), *created)
    except (OmegaConfBaseException, TypeError):
        merged = copy.deepcopy(_defaults(cast(type, schema)))
        for (where, _), update in zip(updates, created, strict=True):  # again one by one: whose fault it is
            merged = _merge(schema, merged, update, where=where)
    try:
        return cast(Schema, _with_home(OmegaConf.to_object(merged)))
    except OmegaConfBaseException as error:
        where = updates[0].where if updates else "defaults"
        key = " ".join(str(error.full_key).split())  # names of a dictionary's entries may be anything
        raise ConfigError(f"{where}: {key}: {_first_line(error)}; fix the value") from None


@functools.cache
def _defaults(schema: type) -> DictConfig:
    """The schema as OmegaConf has it, to be copied: that takes a seventh of the time that making it takes."""
    return OmegaConf.structured(schema)


def _read_yaml(schema: type, path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path}: no such file; give the path of a YAML configuration (see examples/configs)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a readable UTF-8 YAML file") from None
    content = parse_yaml(text, schema, where=str(path), fix="fix the file")
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds a {type(content).__name__}, not sections; start with `model:`, `train:`, …")
    return content


def _parse_override(schema: type, override: str) -> dict[Any, Any]:
    key, equals, value = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
        raise ConfigError(f"override {override!r}: not of the form section.key=value, e.g. optimizer.lr=3e-4")
    content = parse_value(value, hint_of(schema, key), where=f"override {override!r}")
    for name in reversed(key.split(".")):
        content = {name: content}
    return content


def _create(schema: type, content: dict[Any, Any], *, where: str) -> DictConfig:
    """Typed later, by the merge; checked here to consist of sections."""
    for section, kind in field_types(schema).items():
        value = content.get(section, {})
        if (dataclasses.is_dataclass(kind) or typing.get_origin(kind) is dict) and not isinstance(value, dict):
            raise ConfigError(
                f"{where}: {section}: {value!r} is not a section; write keys under it, as in examples/configs"
            )
    try:
        return OmegaConf.create(content)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_first_line(error)}; fix the value") from None


def _with_home(value: Any) -> Any:
    """The same with `~/…` and `~user/…` of texts, and of lists' texts, replaced by the home directory."""
    if dataclasses.is_dataclass(value):
        for item in dataclasses.fields(value):
            setattr(value, item.name, _with_home(getattr(value, item.name)))
    elif isinstance(value, list):
        return [_with_home(entry) for entry in value]
    elif isinstance(value, str) and value.startswith("~"):
        return str(Path(value).expanduser())
    return value


def _merge(schema: type, base: Any, update: DictConfig, *, where: str) -> Any:
    try:
        return OmegaConf.unsafe_merge(base, update)
    except ConfigKeyError as error:
        key = str(error.full_key or error.key)
        raise ConfigError(f"{where}: unknown key {key!r}; {_suggest(schema, key)}") from None
    except ValidationError as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{where}: {key}{_first_line(error)}; give a value of that type") from None
    except (OmegaConfBaseException, TypeError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}; fix the value") from None


def _suggest(schema: type, key: str) -> str:
    """Names the nearest key, or where a Megatron field goes."""
    section, _, leaf = key.rpartition(".")
    known = known_keys(schema)
    if key in known:
        return f"in a file, write {leaf!r} under `{section}:`"
    if "megatron" in known and leaf in FIELDS_PASSED:
        return f"did you mean 'megatron.{leaf}'?"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75) or [
        other for other in known if other.rpartition(".")[2] == leaf
    ]
    if near:
        return f"did you mean {near[0]!r}?"
    siblings = sorted(other for other in known if other.rpartition(".")[0] == section)
    megatron = "; other Megatron fields go under `megatron:`" if "megatron" in known else ""
    return f"keys of {section or 'the file'}: {', '.join(siblings)}{megatron}"


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Dotted names of all sections and keys, those below `megatron` excepted."""
    keys = []
    for name, kind in field_types(schema).items():
        keys.append(prefix + name)
        if dataclasses.is_dataclass(kind):
            keys.extend(known_keys(cast(type, kind), f"{prefix}{name}."))
    return keys


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
