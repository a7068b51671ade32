"""The `megatron:` section: any field of Megatron's own configuration classes, by its own name."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Any

from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from sparsecod_megatron.errors import ConfigError

_CLASSES = (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)


def passthrough(
    fields: dict[str, Any], target: type, ours: dict[str, Any], defaults: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The entries of `megatron:` that belong to `target`, merged over ours.

    Args:
        fields: the section; a key is given to every class that has such a field.
        target: one of Megatron's three configuration classes.
        ours: what the other sections set; a different value under `megatron:` is refused.
        defaults: what we prefer to Megatron's defaults; `megatron:` may change it.

    Returns:
        Keyword arguments for `target`.

    Raises:
        ConfigError: no class has the field, or another section sets it already.
    """
    names = {cls: {item.name for item in dataclasses.fields(cls)} for cls in _CLASSES}
    everything = set().union(*names.values())
    for key, value in fields.items():
        if key not in everything:
            near = difflib.get_close_matches(key, everything, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else "see Megatron-Core's TransformerConfig, OptimizerConfig and DDP config"
            )
            raise ConfigError(f"megatron.{key}: no such Megatron-Core field (value {value!r}); {hint}")
        if key in ours and value != ours[key] and ours[key] is not None:
            raise ConfigError(
                f"megatron.{key}: {value!r}, but another section already sets it to {ours[key]!r}; change it there"
            )
    return {**(defaults or {}), **ours, **{key: value for key, value in fields.items() if key in names[target]}}
