"""The `megatron:` section: any field of Megatron's own configuration classes, by its own name."""

from __future__ import annotations

import dataclasses
from typing import Any


def passthrough(
    fields: dict[str, Any], target: type, ours: dict[str, Any], defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The entries of `megatron:` that belong to `target`, merged with ours.

    Args:
        fields: the section of a checked run, which holds no field that `ours` does (`config/megatron_fields.py`); a
            key is given to every class that has such a field.
        target: one of Megatron's configuration classes.
        ours: what the other sections set.
        defaults: what we prefer to Megatron's defaults; `megatron:` may change it.

    Returns:
        Keyword arguments for `target`.
    """
    assert not fields.keys() & ours.keys(), "a field of `megatron:` that another section sets passed the check"
    names = {item.name for item in dataclasses.fields(target)}
    return {**(defaults or {}), **ours, **{key: value for key, value in fields.items() if key in names}}
