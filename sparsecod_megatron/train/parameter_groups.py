"""Which parameters do not decay, and which learn at another rate, as overrides of Megatron-Core's parameter groups.

A parameter is of one kind, told by its name in a GPTModel. Under muP for AdamW, with r = `model.width_ratio`:

    norms, biases, embeddings     lr
    hidden (all other matrices)   lr / r
    output, router                lr / r    (their input is wide, their output is not)

Source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 3.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from sparsecod_megatron.config import RunConfig

KINDS = ("norms", "biases", "embeddings", "output", "router", "hidden")
"""What `parameter_kind` answers; all but the last are choices of `optimizer.no_weight_decay`."""
_RATE_FALLS_WITH_WIDTH = ("hidden", "output", "router")


def parameter_kind(name: str, parameter: Tensor, *, tied: bool) -> str:
    """One of KINDS.

    Args:
        name: of the parameter in a GPTModel, wrapped or not.
        parameter: itself; its shape tells a norm from a matrix.
        tied: whether the output layer is the embedding, of which the last pipeline stage holds a copy.
    """
    module, _, leaf = name.rpartition(".")
    if re.fullmatch(r"(\w+_)?bias\d*", leaf):
        return "biases"
    if parameter.dim() == 1 and ("norm" in module.rpartition(".")[2] or "norm" in leaf):
        return "norms"
    if module.endswith("word_embeddings"):
        return "embeddings"
    if module.endswith("output_layer"):
        return "embeddings" if tied else "output"
    return "router" if module.endswith("mlp.router") else "hidden"


def group_overrides(config: RunConfig) -> dict[ParamKey, ParamGroupOverride]:
    """What Megatron-Core's parameter groups are made from: an override for each kind that differs from the default."""
    overrides: dict[ParamKey, Any] = {}
    for kind in KINDS:
        override = _decay(config, kind) | _rate(config, kind)
        if override:
            predicate = ParamWithNamePredicate(name=kind, fn=partial(_is_kind, config, kind))
            overrides[ParamKey(with_name_predicate=predicate)] = override
    return overrides


def _is_kind(config: RunConfig, kind: str, parameter: Tensor, name: str) -> bool:
    return parameter_kind(name, parameter, tied=not config.model.untie_embeddings_and_output_weights) == kind


def _decay(config: RunConfig, kind: str) -> dict[str, float]:
    return {"wd_mult": 0.0} if kind in config.optimizer.no_weight_decay else {}


def _rate(config: RunConfig, kind: str) -> dict[str, float]:
    ratio = config.model.width_ratio
    if ratio == 1 or kind not in _RATE_FALLS_WITH_WIDTH:
        return {}
    peak = config.optimizer.lr / ratio
    # The schedule reads the two ends; lr_mult is what Megatron-Core recognises a group by when its state is loaded.
    return {"max_lr": peak, "min_lr": peak * config.schedule.min_lr_ratio, "lr_mult": 1 / ratio}
