"""How the schema states which values a key takes, and the message for one that is out of bounds."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

TYPE_KEY = "read_as"
"""Metadata of a key whose YAML is of another type than the schema can say: that type, or `ValuesOf`."""


@dataclass(frozen=True)
class ValuesOf:
    """The type of a list of values for a key of `schema`, which `named_by` names in the same section."""

    schema: type
    named_by: str


def text_or_list() -> Any:
    """An optional field that takes text or a list of texts and numbers."""
    return field(default=None, metadata={TYPE_KEY: str | list[Any]})


def choice(default: str, *others: str) -> Any:
    """A string field with a closed set of values, the default first."""
    return field(default=default, metadata={"choices": (default, *others)})


def at_least(minimum: float, default: Any) -> Any:
    """A number field (or an optional one) that is refused below `minimum`."""
    return field(default=default, metadata={"minimum": minimum})


def above(limit: float, default: Any) -> Any:
    """A number field refused at `limit` and below."""
    return field(default=default, metadata={"above": limit})


def from_to_below(minimum: float, limit: float, default: Any) -> Any:
    """A number field refused outside [minimum, limit)."""
    return field(default=default, metadata={"minimum": minimum, "below": limit})


def between(minimum: float, maximum: float, default: Any) -> Any:
    """A number field refused outside [minimum, maximum]."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def choices_of(*default: str, among: tuple[str, ...]) -> Any:
    """A list field whose entries come from a closed set."""
    return field(default_factory=lambda: list(default), metadata={"entries": among})


@functools.cache
def field_types(schema: type) -> dict[str, Any]:
    """Types of a dataclass's fields by name, not to be changed; Python evaluates the annotations each time."""
    return typing.get_type_hints(schema)


def indivisible(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    """The problem, if there is one, of a value that another must divide."""
    if value % by:
        yield f"{key}: {value} is not divisible by {by_key}={by}; change one of them"


def bound_problems(section: Any, prefix: str = "") -> Iterator[str]:
    """The values of a section, and of the sections in it, that their fields do not allow."""
    schema: type = type(section)
    types = field_types(schema)
    for item in dataclasses.fields(section):
        value, key, limits = getattr(section, item.name), prefix + item.name, item.metadata
        if dataclasses.is_dataclass(value):
            yield from bound_problems(value, f"{key}.")
        elif value is None:
            continue
        elif strangers := _unknown_values(value, types[item.name]):
            yield f"{key}: {strangers[0]!r} cannot be an entry of this list; give single values"
        elif "entries" in limits:
            unknown = [entry for entry in value if entry not in limits["entries"]]
            if unknown:
                yield f"{key}: {unknown[0]!r} is not one of {', '.join(limits['entries'])}; choose among these"
        elif "choices" in limits and value not in limits["choices"]:
            yield f"{key}: {value!r} is not one of {', '.join(limits['choices'])}; choose one of them"
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{key}: {value} is non-finite; give a finite number"
        elif "above" in limits and not value > limits["above"]:
            yield f"{key}: {value} is not above {limits['above']}; raise it"
        elif "below" in limits and not value < limits["below"]:
            yield f"{key}: {value} is not below {limits['below']}; lower it"
        elif "minimum" in limits and not value >= limits["minimum"]:
            yield f"{key}: {value} is below {limits['minimum']}; raise it"
        elif "maximum" in limits and not value <= limits["maximum"]:
            yield f"{key}: {value} is above {limits['maximum']}; lower it"


def _unknown_values(value: Any, hint: Any) -> list[Any]:
    """Entries of a typed list that are not of its type, which OmegaConf lets through when they are lists."""
    kinds = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is list]
    return [entry for entry in value if not isinstance(entry, typing.get_args(kinds[0]))] if kinds else []
