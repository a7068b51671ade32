"""How a key says in the schema which values it takes: `check.py` reads these bounds and choices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Any


def choice(default: str, *others: str) -> Any:
    """A string field with a closed set of values, the default first."""
    return field(default=default, metadata={"choices": (default, *others)})


def at_least(minimum: float, default: Any) -> Any:
    """A number field (or an optional one) that is refused below `minimum`."""
    return field(default=default, metadata={"minimum": minimum})


def between(minimum: float, maximum: float, default: Any) -> Any:
    """A number field refused outside [minimum, maximum]."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


def choices_of(*default: str, among: tuple[str, ...]) -> Any:
    """A list field whose entries come from a closed set."""
    return field(default_factory=lambda: list(default), metadata={"entries": among})


def indivisible(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    """The problem, if there is one, of a value that another must divide."""
    if value % by:
        yield f"{key}: {value} is not divisible by {by_key}={by}; change one of them"
