"""The `megatron:` section: any field of Megatron's own configuration classes, by its own name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def passthrough(
    asked: Mapping[str, Any],
    target: type,
    *,
    sections: Mapping[str, Any],
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Arguments of one of Megatron's configuration classes, each field from one list.

    Args:
        asked: `megatron:` of a checked run, which holds no field that another section or we set
            (`config/megatron_fields.py`); a field is given to every class that has it.
        target: the class.
        sections: what the other sections say.
        fixed: what every run has, whatever its file says.
        defaults: what we prefer to Megatron's defaults; `megatron:` may change it.
    """
    ours = {**sections, **(fixed or {})}
    assert not asked.keys() & ours.keys(), "a field of `megatron:` that another section sets passed the check"
    names = {item.name for item in dataclasses.fields(target)}
    return {**(defaults or {}), **ours, **{name: value for name, value in asked.items() if name in names}}
