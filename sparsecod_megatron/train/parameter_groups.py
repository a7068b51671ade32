"""Which parameters do not decay, and which learn at another rate, as overrides of Megatron-Core's parameter groups.

A parameter's group stands in the table of parameters. Under muP for AdamW, with r = `model.width_ratio`:

    norms, biases, embeddings     lr
    residual (never decays)       lr
    hidden (all other matrices)   lr / r
    output, router                lr / r    (their input is wide, their output is not)

A row's own factors on rate, weight decay and Adam's ε come on top.

Source: Yang et al., Tensor Programs V (arXiv 2203.03466), table 3.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.optimizer_param_scheduler import ParamGroupOverride
from torch import Tensor

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameter_kind import GROUPS, NEVER_DECAYS, RATE_FALLS_WITH_WIDTH, StepFactors
from sparsecod_megatron.config.parameters import ParameterTable


def group_overrides(config: RunConfig) -> dict[ParamKey, ParamGroupOverride]:
    """What Megatron-Core's parameter groups are made from: an override for each that differs from the default."""
    overrides: dict[ParamKey, Any] = {}
    table = ParameterTable.of(config)
    for group, factors in [(name, factors) for name in GROUPS for factors in table.step_factors(name)]:
        override = _decay(config, group, factors.decay) | _rate(config, group, factors.rate)
        override |= _epsilon(config, factors.epsilon)
        if override:
            key = " × ".join([group, *(f"{factor:g}" for factor in factors)])
            predicate = ParamWithNamePredicate(name=key, fn=partial(_is_in_group, table, group, factors))
            overrides[ParamKey(with_name_predicate=predicate)] = override
    return overrides


def _is_in_group(table: ParameterTable, group: str, factors: StepFactors, parameter: Tensor, name: str) -> bool:
    kind = table.find(name)
    return kind.group == group and kind.step_factors == factors


def _decay(config: RunConfig, group: str, factor: float) -> dict[str, float]:
    factor = 0.0 if group in (*config.optimizer.no_weight_decay, NEVER_DECAYS) else factor
    return {} if factor == 1 else {"wd_mult": factor}


def _epsilon(config: RunConfig, factor: float) -> dict[str, float]:
    if factor == 1:
        return {}
    # By wd_mult, lr_mult and is_decoupled_lr, which nothing else reads, does Megatron-Core recognise a group when its
    # state is loaded: two that differed in ε alone would both get the ε of one.
    return {"eps": config.optimizer.adam_eps * factor, "is_decoupled_lr": factor}


def _rate(config: RunConfig, group: str, factor: float) -> dict[str, float]:
    ratio = config.model.width_ratio if group in RATE_FALLS_WITH_WIDTH else 1.0
    if ratio == factor == 1:
        return {}
    multiplier = factor / ratio
    peak = config.optimizer.lr * multiplier
    # The schedule reads the two ends; lr_mult is what Megatron-Core recognises a group by when its state is loaded.
    return {"max_lr": peak, "min_lr": peak * config.schedule.min_lr_ratio, "lr_mult": multiplier}
