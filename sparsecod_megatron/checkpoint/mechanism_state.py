"""What mechanisms keep in a checkpoint beside weights and optimizer, and which run may take it over or leave it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from sparsecod_megatron.checkpoint.parts import TrainingParts
from sparsecod_megatron.checkpoint.sharded import pieces, sharded_leaves
from sparsecod_megatron.checkpoint.state import saved_config
from sparsecod_megatron.checkpoint.stream import stored_metadata
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.model_keys import mechanism_differences
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.seams.plugin import STATE_PREFIX, Plugin

PART = "mechanisms"
"""The part of the state that belongs neither to a model nor to the optimizer."""


def plugin_state(plugins: Sequence[Plugin], weights: ShardedStateDict) -> ShardedStateDict:
    """What plugins keep, or nothing where none keeps any. Collective over all processes.

    Args:
        plugins: of the run's mechanisms.
        weights: sharded state of the model.
    """
    states = {plugin.name: state for plugin in plugins if (state := plugin.sharded_state(weights))}
    keys = [piece.key for _, leaf in sharded_leaves(states) for piece in pieces(leaf)]
    assert all(key.startswith(STATE_PREFIX) for key in keys), "a mechanism's tensors would be taken for weights"
    return {PART: states} if states else {}


def restore_plugins(plugins: Iterable[Plugin], loaded: dict[str, Any]) -> None:
    """Hand each plugin its tensors of a loaded state. Local."""
    for plugin in plugins:
        plugin.restore(loaded.get(PART, {}).get(plugin.name, {}))


def plugins_to_restore(directory: Path, parts: TrainingParts) -> list[Plugin]:
    """The run's plugins whose state a checkpoint keeps, where only its weights are wanted. Local.

    Raises:
        CheckpointError: it keeps a mechanism's state that this run has no use for.
        DamagedCheckpoint: its index or configuration cannot be read.
    """
    theirs, plugins = saved_config(directory), {plugin.name: plugin for plugin in parts.plugins}
    changed = {difference.key.split(".")[1]: difference for difference in mechanism_differences(theirs, parts.config)}
    kept = [name for name in mechanisms_with_state(directory) if theirs.mechanisms[name].weights_need_state]
    for name in kept:
        if name in changed or name not in plugins:
            what = changed[name].described if name in changed else "this run keeps none"
            raise CheckpointError(
                f"{directory}: it keeps the state of mechanisms.{name}, without which its weights train otherwise, and "
                f"{what}; configure it as there, or leave that state behind with checkpoint.init_from and "
                "checkpoint.densify=true"
            )
    return [plugins[name] for name in kept]


def check_meaning(saved: RunConfig, config: RunConfig, directory: Path) -> None:
    """Refuse weights whose meaning a mechanism has, or has not, changed. Local.

    Args:
        saved: the run that saved them.
        config: the run that loads them.
        directory: the checkpoint.

    Raises:
        CheckpointError: names the mechanism.
    """
    for difference in mechanism_differences(saved, config):
        name = difference.key.split(".")[1]
        mechanisms = (run.mechanisms.get(name) for run in (saved, config))
        if any(mechanism is not None and mechanism.shapes_weights for mechanism in mechanisms):
            raise CheckpointError(
                f"{directory}: {difference.described}, which gives weights another meaning; use the same, or another "
                "checkpoint"
            )


def mechanisms_with_state(directory: Path) -> list[str]:
    """Mechanisms that have tensors in a checkpoint."""
    keys = stored_metadata(directory).state_dict_metadata
    return sorted({key.removeprefix(STATE_PREFIX).split(".")[0] for key in keys if key.startswith(STATE_PREFIX)})
