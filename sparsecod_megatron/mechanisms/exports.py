"""Lets exported models with mechanisms load in this package, by its own code instead of that beside the weights."""

from __future__ import annotations

import importlib
from typing import Any

from sparsecod_megatron.mechanisms.registry import MECHANISMS


def know_extensions() -> None:
    """Tell the `sparsecod` architecture of every mechanism; whoever opens a HuggingFace directory calls it first."""
    from sparsecod_megatron.hf.extensions_sparsecod import EXTENSIONS, FORMER_FIELDS

    for name, place in MECHANISMS.places.items():
        EXTENSIONS[name] = _Extension(place.partition(":")[0])
    FORMER_FIELDS.update(MECHANISMS.former_keys)


class _Extension:
    """`extend` of a mechanism's exported code, which is imported when a model has it.

    Args:
        module: of the mechanism, below this folder.
    """

    def __init__(self, module: str) -> None:
        self._module = f"{__package__}.{module}_sparsecod"

    def __call__(self, layer: Any, settings: dict[str, Any], config: Any, index: int) -> None:
        importlib.import_module(self._module).extend(layer, settings, config, index)
