"""Where only a checkpoint's weights are taken, what a mechanism keeps beside them is taken too, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sparsecod_megatron.backend import select_backend
from sparsecod_megatron.config import save_config
from sparsecod_megatron.errors import CheckpointError
from tests.helpers.training import small_trainer, trainer_batches

BACKEND = select_backend()
from sparsecod_megatron.checkpoint.saver import save_checkpoint  # noqa: E402
from sparsecod_megatron.checkpoint.state import TrainState  # noqa: E402
from sparsecod_megatron.train.repair import repair  # noqa: E402
from sparsecod_megatron.train.restore import initial_state  # noqa: E402
from sparsecod_megatron.train.step import train_step  # noqa: E402

SHAPE = ("model.num_layers=2",)
SPARSE = (*SHAPE, "mechanisms.sparse_weights.density=0.4")
OTHER_SEED = "train.seed=7"
"""Draws other weights and masks."""


def dead(trainer: Any) -> list[torch.Tensor]:
    """Where the weights are zero, which a drawn one never is."""
    return [weight.detach() == 0 for weight in trainer.models[0].parameters()]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, ours, theirs))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A step of a sparse run with its own masks, in a run directory, and where its weights are dead."""
    run = tmp_path_factory.mktemp("run")
    with small_trainer(*SPARSE) as trainer:
        train_step(trainer, trainer_batches(trainer))
        save_config(trainer.config, run / "config.yaml")
        step = save_checkpoint(run / "checkpoints", trainer, state=TrainState(step=1, optimizer_steps=1))
        return step, dead(trainer)


@pytest.mark.parametrize("way", ["init_from", "repair"])
def test_the_same_mechanism_keeps_its_masks(way: str, saved: tuple[Path, list[torch.Tensor]], tmp_path: Path) -> None:
    """Not those that its seed would draw: neither at once nor after a step."""
    source, expected = saved
    if way == "repair":
        with small_trainer(*SPARSE, OTHER_SEED) as trainer:
            config = trainer.config
        repair(source.parent.parent, source, tmp_path / "repaired", config, BACKEND)
        source = tmp_path / "repaired/checkpoints/step_00000001"
    with small_trainer(*SPARSE, OTHER_SEED, f"checkpoint.init_from={source}") as trainer:
        assert not same(dead(trainer), expected)
        assert initial_state(trainer, []) == TrainState()
        assert same(dead(trainer), expected)
        train_step(trainer, trainer_batches(trainer))
        assert same(dead(trainer), expected)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (SHAPE, "'density': 0.4"),
        ((*SHAPE, "mechanisms.sparse_weights.density=0.3"), "sparse_weights.density is 0.4 there and 0.3 here"),
    ],
)
def test_masks_are_not_lost_without_a_word(
    settings: tuple[str, ...], words: str, saved: tuple[Path, list[torch.Tensor]]
) -> None:
    refusal = pytest.raises(CheckpointError)
    with small_trainer(*settings, f"checkpoint.init_from={saved[0]}") as trainer, refusal as refused:
        initial_state(trainer, [])
    message = str(refused.value)
    assert words in message and message.endswith("checkpoint.densify=true") and "\n" not in message


def test_densify_trains_every_weight(saved: tuple[Path, list[torch.Tensor]]) -> None:
    source, expected = saved
    with small_trainer(*SHAPE, OTHER_SEED, f"checkpoint.init_from={source}", "checkpoint.densify=true") as trainer:
        initial_state(trainer, [])
        assert same(dead(trainer), expected)
        train_step(trainer, trainer_batches(trainer))
        assert sum(int(zeros.sum()) for zeros in dead(trainer)) < sum(int(zeros.sum()) for zeros in expected) / 100
