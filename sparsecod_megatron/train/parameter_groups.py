"""Which parameters do not decay, and which learn at another rate, as overrides of Megatron-Core's parameter groups.

A parameter's group stands in the table of parameters. Under muP for AdamW, with r = `model.width_ratio`:

    norms, biases, embeddings     lr
    residual (never decays)       lr
    hidden (all other matrices)   lr / r
    output, router                lr / r    (their input is wide, their output is not)

Source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import GROUPS, NEVER_DECAYS, RATE_FALLS_WITH_WIDTH, ParameterTable


def group_overrides(config: RunConfig) -> dict[ParamKey, ParamGroupOverride]:
    """What Megatron-Core's parameter groups are made from: an override for each that differs from the default."""
    overrides: dict[ParamKey, Any] = {}
    table = ParameterTable.of(config)
    for group, factor in [(name, factor) for name in GROUPS for factor in table.rates(name)]:
        override = _decay(config.optimizer.no_weight_decay, group) | _rate(config, group, factor)
        if override:
            key = group if factor == 1 else f"{group} × {factor:g}"
            predicate = ParamWithNamePredicate(name=key, fn=partial(_is_in_group, table, group, factor))
            overrides[ParamKey(with_name_predicate=predicate)] = override
    return overrides


def _is_in_group(table: ParameterTable, group: str, factor: float, parameter: Tensor, name: str) -> bool:
    kind = table.find(name)
    return kind.group == group and kind.rate == factor


def _decay(without: Sequence[str], group: str) -> dict[str, float]:
    return {"wd_mult": 0.0} if group in (*without, NEVER_DECAYS) else {}


def _rate(config: RunConfig, group: str, factor: float) -> dict[str, float]:
    ratio = config.model.width_ratio if group in RATE_FALLS_WITH_WIDTH else 1.0
    if ratio == factor == 1:
        return {}
    multiplier = factor / ratio
    peak = config.optimizer.lr * multiplier
    # The schedule reads the two ends; lr_mult is what Megatron-Core recognises a group by when its state is loaded.
    return {"max_lr": peak, "min_lr": peak * config.schedule.min_lr_ratio, "lr_mult": multiplier}
