"""`data.train` and `data.validation`: one prefix of token files, or several with or without weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sparsecod_megatron.errors import ConfigError


@dataclass(frozen=True)
class Blend:
    """Token files to draw from.

    Attributes:
        prefixes: token files without suffix.
        weights: share of the samples of each, in any unit; None is in proportion to their tokens.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def parse_blend(key: str, value: Any) -> Blend:
    """Read a prefix, a list of prefixes, or `[weight, prefix, weight, prefix, …]`.

    Args:
        key: where the value stands, for the message.
        value: as YAML gave it.

    Raises:
        ConfigError: anything else, a weight that is not above 0, or a prefix given twice.
    """
    parts = value if isinstance(value, list) else [value]
    if parts and all(map(_is_prefix, parts)):
        blend = Blend(tuple(parts))
    elif len(parts) % 2 == 0 and parts and all(map(_is_prefix, parts[1::2])) and all(map(_is_number, parts[::2])):
        blend = Blend(tuple(parts[1::2]), tuple(map(float, parts[::2])))
    else:
        raise ConfigError(f"{key}: {value!r} is not a blend; give a prefix, [A, B], or [0.3, A, 0.7, B]")
    for weight in blend.weights or ():
        if not (weight > 0 and math.isfinite(weight)):
            raise ConfigError(f"{key}: weight {weight} is not above 0; raise it or leave its prefix out")
    for prefix in blend.prefixes:
        if blend.prefixes.count(prefix) > 1:
            raise ConfigError(f"{key}: {prefix} is listed twice; list it once, with the sum of its weights")
    return blend


def blend_problems(key: str, value: Any) -> Iterator[str]:
    """The problem of a blend, if there is one; None has no problem."""
    if value is not None:
        try:
            parse_blend(key, value)
        except ConfigError as error:
            yield str(error)


def _is_prefix(part: Any) -> bool:
    return isinstance(part, str) and bool(part)


def _is_number(part: Any) -> bool:
    return isinstance(part, int | float) and not isinstance(part, bool)
