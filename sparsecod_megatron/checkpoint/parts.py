"""What of a run goes into a checkpoint and comes from one: one object where saving and loading took keywords each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.seams.plugin import Plugin


@dataclass(kw_only=True)
class ModelParts:
    """What a checkpoint of weights alone holds.

    Attributes:
        config: the run.
        groups: its process groups.
        models: model chunks of this rank, wrapped or not.
    """

    config: RunConfig
    groups: ProcessGroupCollection
    models: Sequence[torch.nn.Module]


@dataclass(kw_only=True)
class TrainingParts(ModelParts):
    """What a checkpoint that training continues from holds.

    Attributes:
        optimizer: of the models.
        scheduler: learning rate and weight decay by step.
        plugins: what mechanisms do inside the step.
    """

    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    plugins: Sequence[Plugin]
