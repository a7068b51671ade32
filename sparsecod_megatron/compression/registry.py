"""Compression methods by name. A method's module is imported when it is asked for; this one loads no torch."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.compression.method import Method

_METHODS = "sparsecod_megatron.compression.methods"


class Registered(NamedTuple):
    """Where a method is, and what is said of it before it is imported.

    Attributes:
        path: module:class, a `Method`.
        summary: for `--help`, a few words.
        sidecar: the file beside the weights that the method wants to be handed when its directory is opened; its JSON
            names the method.
    """

    path: str
    summary: str
    sidecar: str | None = None


METHODS = {
    "magnitude": Registered(f"{_METHODS}.magnitude:Magnitude", "the smallest weights go, a share of them or n:m"),
    "low_rank": Registered(f"{_METHODS}.low_rank:LowRank", "two thin matrices for one, by a truncated SVD"),
    "sparse24": Registered(f"{_METHODS}.sparse24:Sparse24", "2:4 by magnitude, by ModelOpt"),
    "sparsegpt24": Registered(f"{_METHODS}.sparsegpt24:SparseGPT24", "2:4 by SparseGPT"),
    "fp8": Registered(f"{_METHODS}.fp8:FP8", "weights and layer inputs in E4M3", sidecar="input_ranges.json"),
    "int8": Registered(f"{_METHODS}.int8:INT8", "weights and layer inputs in 8-bit integers", "input_ranges.json"),
}


def find_method(name: str, settings: Sequence[str] = ()) -> Method:
    """A method with its settings.

    Args:
        name: of `METHODS`.
        settings: `key=value`, of the method's `Settings`; the others keep their defaults.

    Raises:
        ConfigError: an unknown name, key or value, or a package that the method needs and that is not installed.
    """
    from sparsecod_megatron.compression.method import read_settings

    method = method_class(name)
    return method(read_settings(method, settings))


def method_class(name: str) -> type[Method]:
    """The class of a method that can run here.

    Raises:
        ConfigError: an unknown name, or a package that the method needs and that is not installed.
    """
    if name not in METHODS:
        raise ConfigError(f"--method {name}: no such method; use {', '.join(METHODS)}")
    method: type[Method] = pkgutil.resolve_name(METHODS[name].path)
    if method.needs.modelopt:
        from sparsecod_megatron.compression.modelopt import require_modelopt

        require_modelopt()
    return method
