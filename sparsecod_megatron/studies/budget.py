"""How many steps every cell trains, so that all have seen the same tokens or spent the same operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsecod_megatron.config import RunConfig, load_config
from sparsecod_megatron.config.flops import flops_per_token
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.errors import ConfigError
from sparsecod_megatron.mechanisms import MECHANISMS
from sparsecod_megatron.planning.vocabulary import with_vocabulary
from sparsecod_megatron.studies.schema import BudgetConfig, Labels, setting_name


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
    if budget.match == "compute":
        reference = next(labels for labels in runs if _is_reference(labels, budget.reference, runs))
        flops = tokens[reference] * training_flops_per_token(configs[reference])
        tokens = {labels: flops / training_flops_per_token(config) for labels, config in configs.items()}
    changed = budget.tokens is not None or budget.match == "compute"
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


def training_flops_per_token(config: RunConfig) -> float:
    """Forward and backward; convention `full` of config/flops.py."""
    completed, _ = with_vocabulary(config)
    return flops_per_token(ParameterTable.of(completed), config.data.seq_length)


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
