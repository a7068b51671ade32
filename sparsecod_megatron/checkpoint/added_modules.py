"""Weights of a model without a mechanism, taken into one that has it, whose own weights stay as they are drawn."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.model import unwrap
from sparsecod_megatron.model.transformer_config import layers_differ
from sparsecod_megatron.seams.mechanism import configured


class AddedModules:
    """Modules and parameters of a run's layers that a checkpoint cannot have: its run had no such mechanism.

    Args:
        saved: the run that saved it.
        config: the run that loads it.
    """

    def __init__(self, saved: RunConfig, config: RunConfig) -> None:
        added = (mechanism for mechanism in configured(config) if mechanism.name not in saved.mechanisms)
        self.names = sorted({name for mechanism in added for name in mechanism.adds_modules})
        self._saved = saved

    def stack_layers_as_saved(self, models: Sequence[torch.nn.Module], *, undo: bool = False) -> None:
        """Describe layers as the checkpoint has them: stacked where they were alike. Local.

        Args:
            models: chunks of this rank.
            undo: describe them as this run saves them again.
        """
        if self.names:
            for model in models:
                config = unwrap(model).decoder.config
                config.hetereogenous_dist_checkpoint = True if undo else layers_differ(self._saved)

    def hold(self, key: str) -> bool:
        """Whether a key of a chunk's state belongs to them."""
        found = re.match(r"decoder\.layers\.\d+\.(.+)", key)
        return found is not None and any(part in self.names for part in found[1].split("."))

    def left_out(self, sharded: ShardedStateDict) -> ShardedStateDict:
        """A sharded state of models by chunk, without theirs. Local."""
        return {name: {key: leaf for key, leaf in part.items() if not self.hold(key)} for name, part in sharded.items()}
