"""YAML without surprises: text keys keep the text that was typed, integers are decimal, a key stands once.

PyYAML follows YAML 1.1, where `2024_01_01` and `12:30` are integers in text that nobody meant as a number, `0123` is
octal, `no` is false, and of two equal keys the first is lost. What a scalar means is decided by the type of its key.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias, cast

import yaml

from sparsecod_megatron.config.fields import TYPE_KEY, ValuesOf, field_types
from sparsecod_megatron.errors import ConfigError

_STRING, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_NULL_TEXT = re.compile(r"~|null|Null|NULL|")
_QUOTES = ("'", '"')
_DIGITS = r"\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE])"
_Hint: TypeAlias = Any
"""A type, as `typing.get_type_hints` gives it."""


class _Loader(yaml.SafeLoader):
    """Scalars as YAML 1.2 reads them, without its octal and hexadecimal integers."""

    yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", _NULL_TEXT.pattern, ["~", "n", "N", ""]),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", rf"[-+]?({_DIGITS})([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+0123456789."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def parse_yaml(text: str, hint: _Hint, *, where: str, fix: str) -> Any:
    """One YAML document as plain values.

    Args:
        text: the document.
        hint: the type that it is to have, such as a dataclass of sections; decides which scalars are text.
        where: what it came from, for messages.
        fix: what to do about text that is not YAML.

    Raises:
        ConfigError: text that is not YAML, or a key that stands twice.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for problem in _duplicates(node, ""):
            raise ConfigError(f"{where}: {problem}")
        _keep_text(node, hint)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark and "\n" in text else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{where}{line}: not valid YAML ({problem}); {fix}") from None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{where}: nested too deep, or an anchor within itself; write the values out") from None
    except ValueError as error:  # tagged as a date or a number, but not one
        raise ConfigError(f"{where}: not valid YAML ({str(error).splitlines()[0]}); {fix}") from None


def parse_value(text: str, hint: _Hint, *, where: str) -> Any:
    """The value of an override: text keys take it as it is typed, `#` and `:` included, others as YAML.

    Args:
        text: what stands behind `=`.
        hint: the type of the key; Any where there is no such key.
        where: what it came from, for messages.

    Raises:
        ConfigError: text that is not YAML, for a key that is not text.
    """
    typed = text.strip()
    is_list = typed.startswith(("[", "{")) and any(_origin(kind) is list for kind in _kinds(hint))
    is_line = text.isprintable()  # paths and names with anything else are more likely damage than meant
    if _is_text(hint) and is_line and not is_list and not typed.startswith(_QUOTES) and not _NULL_TEXT.fullmatch(typed):
        return text
    return parse_yaml(text, hint, where=where, fix="quote the value")


def hint_of(schema: type, key: str) -> _Hint:
    """The type of a dotted key; Any for an unknown one."""
    hint: _Hint = schema
    for name in key.split("."):
        hint = _hints(hint).get(name, _entry(hint, dict))
    return hint


@functools.cache  # every override asks again
def _hints(hint: _Hint) -> Mapping[str, _Hint]:
    """Types that the keys below a section are read as."""
    if not dataclasses.is_dataclass(hint):
        return {}
    marked = {item.name: item.metadata[TYPE_KEY] for item in dataclasses.fields(hint) if TYPE_KEY in item.metadata}
    return field_types(cast(type, hint)) | marked


def _kinds(hint: _Hint) -> tuple[_Hint, ...]:
    """The members of a union, or the type itself."""
    return typing.get_args(hint) if _origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _origin(hint: _Hint) -> object:
    return typing.get_origin(hint)


def _is_text(hint: _Hint) -> bool:
    return str in _kinds(hint)


def _keep_text(node: yaml.Node, hint: _Hint) -> None:
    """Mark plain scalars as strings where their key is text."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                key.tag = _STRING
                _keep_text(value, _below(node, hint, key.value))
            else:
                _keep_text(value, hint)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _keep_text(entry, _entry(hint, list))
    elif _is_text(hint) and node.tag != _NULL:
        node.tag = _STRING


def _below(node: yaml.MappingNode, hint: _Hint, name: str) -> _Hint:
    """The type of what stands under a name, which has dots where changes of a run are written in short."""
    found = hint_of(hint, name) if _hints(hint) else _entry(hint, dict)
    if not isinstance(found, ValuesOf):
        return found
    named = (value.value for key, value in node.value if key.value == found.named_by)
    return types.GenericAlias(list, (hint_of(found.schema, str(next(named, ""))),))


def _entry(hint: _Hint, container: type) -> _Hint:
    """The type of a list's or dictionary's entries; Any where it does not say."""
    found = [typing.get_args(kind)[-1] for kind in _kinds(hint) if _origin(kind) is container]
    return found[0] if found else Any


def _duplicates(node: yaml.Node, prefix: str) -> Iterator[str]:
    """One line for each key that stands twice in one section."""
    if isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            yield from _duplicates(entry, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in lines:
            yield f"{name}: given on line {lines[name]} and again on line {line}; keep one"
        lines[name] = line
        yield from _duplicates(value, f"{name}.")
