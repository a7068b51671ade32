"""What a model computes with, where a mechanism stores other weights: what exports and their reference hold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from sparsecod_megatron.checkpoint.state import read_state
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import ParameterTable
from sparsecod_megatron.seams.mechanism import configured, model_at
from sparsecod_megatron.seams.plugin import StepContext


def context_of(config: RunConfig, step_dir: Path) -> StepContext:
    """The step of a checkpoint of this run."""
    return StepContext(read_state(step_dir).train.step, config.train.train_steps)


def effective_config(config: RunConfig, step_dir: Path) -> RunConfig:
    """With the model that the run computes with at the step of a checkpoint."""
    return replace(config, model=model_at(config, context_of(config, step_dir)))


class EffectiveTensors(Mapping[str, Tensor]):
    """Tensors by name, each computed from the stored one when it is asked for.

    Args:
        stored: every parameter under its name in a single-process GPTModel.
        config: of the run that stored them.
        step_dir: the checkpoint.

    Attributes:
        context: its step.
    """

    def __init__(self, stored: Mapping[str, Tensor], config: RunConfig, step_dir: Path) -> None:
        self._mechanisms, self._table = configured(config), ParameterTable.of(config)
        for mechanism in self._mechanisms:
            stored = mechanism.plain_tensors(config.model, stored)
        self._stored = stored
        self.context = context_of(config, step_dir)

    def __getitem__(self, name: str) -> Tensor:
        """On the stored tensor's device, in its type."""
        weight = self._stored[name]
        found = re.search(r"decoder\.layers\.(\d+)\.", name)
        # Buffers, such as the router's selection bias, have no row in the table, and no mechanism.
        if found is None or weight.dim() < 2:
            return weight
        for mechanism in self._mechanisms:
            weight = mechanism.effective_weight(self._table.find(name), int(found[1]), weight, self.context)
        return weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def folded_tensors(tensors: Mapping[str, Tensor], config: RunConfig) -> Mapping[str, Tensor]:
    """What a model computes with, as an export of it holds that."""
    for mechanism in configured(config):
        tensors = mechanism.folded(ParameterTable.of(config), tensors)
    return tensors


@torch.no_grad()
def make_effective(model: GPTModel, config: RunConfig, step_dir: Path) -> None:
    """Give the parameters of a single-process model, which hold a checkpoint's, what its export holds. Local."""
    for mechanism in configured(config):
        mechanism.make_plain(model)
    parameters = dict(model.named_parameters())
    for name, weight in folded_tensors(EffectiveTensors(parameters, config, step_dir), config).items():
        if weight is not parameters[name]:
            parameters[name].copy_(weight)
    for mechanism in configured(config):
        mechanism.fold(config.model, model)
