"""The small part of a checkpoint: progress, random states, and what the model was, as JSON that anyone can read."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsecod_megatron.checkpoint.manifest import DamagedCheckpoint
from sparsecod_megatron.checkpoint.paths import STATE_FILE
from sparsecod_megatron.checkpoint.random_states import RandomStates
from sparsecod_megatron.config import ParallelConfig, RunConfig, load_config
from sparsecod_megatron.config.model_keys import Difference, model_differences
from sparsecod_megatron.config.run_files import CONFIG_FILE
from sparsecod_megatron.errors import CheckpointError, ConfigError
from sparsecod_megatron.mechanisms import SAVED_MECHANISMS

FORMAT = 3
"""Version of state.json; a reader refuses any other but `FORMAT_WITHOUT_DIGESTS`."""
FORMAT_WITHOUT_DIGESTS = 2
"""An older format that is still read; such a checkpoint is judged by its weights alone."""


@dataclass
class TrainState:
    """Progress of a run.

    Attributes:
        step: optimizer steps done.
        consumed_samples: sequences of the training set used so far.
        consumed_tokens: tokens that counted in the loss so far.
        optimizer_steps: steps that changed the weights (Adam's bias correction counts these).
        data: fingerprint of the data trained on (`data/fingerprint.py`); empty where none was taken.
        monitor: what the judge of updates remembers of the steps before.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    optimizer_steps: int = 0
    data: dict[str, str] = field(default_factory=dict)
    monitor: dict[str, Any] = field(default_factory=dict)


@dataclass
class StateFile:
    """Content of state.json.

    Attributes:
        train: progress.
        scheduler: Megatron-Core's learning-rate schedule; empty where there was none, and no optimizer: nothing has
            been trained.
        layout: layout of the processes that saved it (`layout_of`).
        random_states: by rank.
        digests: digests of the optimizer's tensors by parameter (`digests.py`); empty in earlier formats.
        format: version.
    """

    train: TrainState
    scheduler: dict[str, Any]
    layout: dict[str, Any]
    random_states: RandomStates = field(default_factory=list)
    digests: dict[str, dict[str, int]] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def is_weights_alone(self) -> bool:
        """Whether optimizer and schedule start from scratch in the run that loads it."""
        return not self.scheduler


def write_state(state: StateFile, directory: Path) -> None:
    """Write state.json."""
    (directory / STATE_FILE).write_text(json.dumps(dataclasses.asdict(state)))


def read_state(directory: Path) -> StateFile:
    """Read state.json.

    Raises:
        CheckpointError: it is of another version.
        DamagedCheckpoint: absent or damaged.
    """
    path = directory / STATE_FILE
    try:
        content = json.loads(path.read_text())
        found = content["format"]
        if found in (FORMAT, FORMAT_WITHOUT_DIGESTS):
            return StateFile(**{**content, "train": TrainState(**content["train"])})
    except FileNotFoundError:
        raise DamagedCheckpoint(
            f"{directory}: not a complete checkpoint (no {STATE_FILE}); choose another step"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{path}: damaged ({type(error).__name__}: {error}); choose another step") from None
    raise CheckpointError(
        f"{path}: format {found}, this version reads {FORMAT}; convert it with the version that wrote it"
    )


def layout_of(parallel: ParallelConfig) -> dict[str, Any]:
    """What must be equal for a resumed run to be bitwise the same: the layout and the number of processes."""
    return {**dataclasses.asdict(parallel), "world_size": dist.get_world_size()}


def saved_config(directory: Path) -> RunConfig:
    """The run that wrote a checkpoint.

    Raises:
        DamagedCheckpoint: its configuration cannot be read.
    """
    try:
        return load_config(directory / CONFIG_FILE, mechanisms=SAVED_MECHANISMS)
    except ConfigError as error:
        raise DamagedCheckpoint(f"{directory}: damaged ({' '.join(str(error).split())}); choose another step") from None


def check_same_model(saved: RunConfig, config: RunConfig, directory: Path) -> None:
    """Refuse to resume from a checkpoint of another model or optimizer, naming the first key that differs.

    Raises:
        CheckpointError: a key differs that shapes the weights, decides what is computed with them, or what steps them.
        DamagedCheckpoint: its configuration cannot be read.
    """
    differences = [*model_differences(saved, config)]
    if saved.optimizer.optimizer != config.optimizer.optimizer:
        differences.append(Difference("optimizer.optimizer", saved.optimizer.optimizer, config.optimizer.optimizer))
    for difference in differences:
        raise CheckpointError(
            f"{directory}: checkpoint of another model or optimizer: {difference.described}; use that value, or start "
            "another logging.run_dir from these weights with checkpoint.init_from"
        )
