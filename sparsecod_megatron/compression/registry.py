"""Compression methods by name. A method's module is imported when it is asked for; this one loads no torch.

Pruning rules are composed: the first word makes a mask, words after `+` change mask or values (`LATER_WORDS`).
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.compression.method import Method

_METHODS = "sparsecod_megatron.compression.methods"
_PRUNING = f"{_METHODS}.pruning:Pruning"


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
    "magnitude": Registered(_PRUNING, "the smallest weights go"),
    "wanda": Registered(_PRUNING, "weights times the norms of their inputs"),
    "gblm": Registered(_PRUNING, "Wanda's score and the loss's gradients"),
    "obs": Registered(_PRUNING, "what a weight costs once all others of its row have answered"),
    "random": Registered(_PRUNING, "any weights go"),
    "sparsegpt": Registered(_PRUNING, "mask and values column by column"),
    "gqsa": Registered(_PRUNING, "whole groups by obs's score, the others rounded to a few bits"),
    "low_rank": Registered(f"{_METHODS}.low_rank:LowRank", "two thin matrices for one, by a truncated SVD"),
    "welore": Registered(f"{_METHODS}.welore:WeLore", "the same, ranks by one threshold for all matrices"),
    "neurons": Registered(f"{_METHODS}.neurons:Neurons", "whole inner channels of feed-forward layers go"),
    "soups": Registered(f"{_METHODS}.soups:Soups", "the mean of models with the same zeros"),
    "slicegpt": Registered(f"{_METHODS}.slicegpt:SliceGPT", "a rotated and narrower residual stream"),
    "sparse_expansion": Registered(
        f"{_METHODS}.sparse_expansion:SparseExpansion", "feed-forward layers pruned once for each cluster of inputs"
    ),
    "fp8": Registered(f"{_METHODS}.fp8:FP8", "weights and layer inputs in E4M3", sidecar="input_ranges.json"),
    "int8": Registered(f"{_METHODS}.int8:INT8", "weights and layer inputs in 8-bit integers", "input_ranges.json"),
}
LATER_WORDS = {
    "dsnot": "weights of the mask change places",
    "update": "remaining weights make up for the pruned ones, by SparseGPT's sweep",
    "cg": "by conjugate gradients",
}
"""What can follow a pruning rule's first word, as in `wanda+dsnot+cg`."""
FORMER_NAMES = {"sparse24": "magnitude", "sparsegpt24": "sparsegpt"}
"""Names of earlier versions, and the rules that do the same with `--set pattern=2:4`."""


def find_method(name: str, settings: Sequence[str] = ()) -> Method:
    """A method with its settings.

    Args:
        name: of `METHODS`, or a composed rule.
        settings: `key=value`, of the method's `Settings`; the others keep their defaults.

    Raises:
        ConfigError: an unknown name, key or value, or a package that the method needs and that is not installed.
    """
    from sparsecod_megatron.compression.method import read_settings

    method = method_class(name)
    return method.named(name, read_settings(method, name, settings))


def method_class(name: str) -> type[Method]:
    """The class of a method that can run here.

    Raises:
        ConfigError: an unknown name, or a package that the method needs and that is not installed.
    """
    if name in FORMER_NAMES:
        raise ConfigError(f"--method {name}: is now --method {FORMER_NAMES[name]} --set pattern=2:4")
    first = name.partition("+")[0]
    if first not in METHODS:
        raise ConfigError(f"--method {name}: no such method; use {', '.join(METHODS)}")
    method: type[Method] = pkgutil.resolve_name(METHODS[first].path)
    if method.needs.modelopt:
        from sparsecod_megatron.compression.modelopt import require_modelopt

        require_modelopt()
    return method
