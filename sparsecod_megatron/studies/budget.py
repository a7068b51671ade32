"""How many steps every cell trains, so that all have seen the same tokens or spent the same operations."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.config.flops import BACKWARD_FACTOR, flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.planning.vocabulary import with_vocabulary
from sparsecod_megatron.seams.mechanism import model_at
from sparsecod_megatron.seams.plugin import StepContext
from sparsecod_megatron.studies.schema import BudgetConfig, Labels, setting_name

SAMPLED_STEPS = 200
"""Steps of the run of which the operations are averaged."""


def set_budget(budget: BudgetConfig, base: Path, runs: Mapping[Labels, Sequence[str]]) -> dict[Labels, list[str]]:
    """The runs' changes with those of the budget behind them.

    Args:
        budget: tokens or operations that all have in common.
        base: run configuration.
        runs: changes of it by place in the grid.

    Raises:
        ConfigError: a run that cannot be, or a budget of less than a step.
    """
    configs = {labels: _load(base, labels, changes) for labels, changes in runs.items()}
    tokens = {labels: float(training_tokens(config)) for labels, config in configs.items()}
    if budget.tokens is not None:
        tokens = dict.fromkeys(tokens, float(budget.tokens))
    if budget.match != "tokens":
        is_effective = budget.match == "effective_compute"
        costs = {
            labels: training_flops_per_token(config, is_effective=is_effective) for labels, config in configs.items()
        }
        reference = next(labels for labels in runs if _is_reference(labels, budget.reference, runs))
        tokens = {labels: tokens[reference] * costs[reference] / cost for labels, cost in costs.items()}
    changed = budget.tokens is not None or budget.match != "tokens"
    found = {}
    for labels, changes in runs.items():
        config = configs[labels]
        steps = round(tokens[labels] / tokens_per_step(config)) if changed else config.train.train_steps
        if steps < 1:
            raise ConfigError(
                f"budget.tokens: {tokens[labels]:.0f} are less than half a step of {tokens_per_step(config)}; raise it"
            )
        own = [f"train.train_steps={steps}"] if changed else []
        if budget.warmup_share is not None:
            own.append(f"schedule.lr_warmup_steps={int(budget.warmup_share * steps)}")
        found[labels] = [*changes, *own]
    return found


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of the full batch."""
    return config.train.global_batch_size * config.data.seq_length


def training_flops_per_token(config: RunConfig, *, is_effective: bool = False) -> float:
    """Forward and backward, on average over a run; convention `full` of config/flops.py.

    Args:
        config: of the run.
        is_effective: without the products with weights that mechanisms hold at zero.
    """
    config = with_vocabulary(config)[0]
    table = ParameterTable.of(config)
    # Schedules are functions of the share of the steps, so that steps need not be known yet.
    steps = [StepContext(step, SAMPLED_STEPS) for step in range(1, SAMPLED_STEPS + 1)]
    models = [model_at(config, step) for step in steps]
    numbers = [flops_per_token(replace(table, model=models[0]), config.data.seq_length)]
    for before, model in itertools.pairwise(models):
        same = model == before
        numbers.append(numbers[-1] if same else flops_per_token(replace(table, model=model), config.data.seq_length))
    flops = sum(numbers) / len(numbers)
    if not is_effective:
        return flops
    idle = sum(
        mechanism.idle_products(replace(table, model=model), step)
        for mechanism in table.mechanisms
        for model, step in zip(models, steps, strict=True)
    )
    return flops - BACKWARD_FACTOR * 2.0 * idle / len(steps)


def training_tokens(config: RunConfig) -> int:
    """Tokens of all steps."""
    return config.train.train_steps * tokens_per_step(config)


def _load(base: Path, labels: Labels, changes: Sequence[str]) -> RunConfig:
    try:
        # Only sizes count here; a warm-up meant for the budget's steps may be longer than the base's.
        return load_config(base, [*changes, "schedule.lr_warmup_steps=0"], mechanisms=MECHANISMS)
    except ConfigError as error:
        raise ConfigError(f"cell {setting_name(labels)}: {error}") from None


def _is_reference(labels: Labels, reference: Mapping[str, str], runs: Mapping[Labels, Sequence[str]]) -> bool:
    first = dict(next(iter(runs)))
    return dict(labels) == {**first, **reference}
