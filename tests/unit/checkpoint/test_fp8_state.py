"""Checkpoints load on either backend: those of `delayed` scaling alone hold FP8 scales; reading them runs nothing."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sparsecod_megatron.errors import CheckpointError
from tests.helpers.training import small_trainer

if TYPE_CHECKING:
    from sparsecod_megatron.train.setup import Trainer


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    with small_trainer("model.num_layers=2") as trainer:
        yield trainer


def keep_scales(trainer: Trainer, scale: float, *, delayed: bool, content: Any = None) -> torch.nn.Module:
    """The final norm with state as Transformer Engine's modules have it, which reference modules lack there."""
    from sparsecod_megatron.model import unwrap

    model = unwrap(trainer.models[0])
    norm = model.decoder.final_layernorm

    class Scaled(type(norm)):  # type: ignore[misc]
        def get_extra_state(self) -> torch.Tensor:
            state = {"scale_fwd": self.scale, "recipe": {"history": 4}} if content is None else content
            return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.scale = pickle.loads(state.numpy().tobytes())["scale_fwd"]

    norm.__class__, norm.scale = Scaled, torch.tensor([scale, 2.0])
    model.config.fp8, model.config.fp8_recipe = "hybrid", "delayed" if delayed else "blockwise"
    return norm


def save(trainer: Trainer, folder: Path) -> Path:
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    return save_checkpoint(folder, trainer, state=TrainState(step=1))


def load(trainer: Trainer, directory: Path) -> int:
    from sparsecod_megatron.checkpoint.native import load_checkpoint, load_weights

    load_weights(directory, trainer)
    return load_checkpoint(directory, trainer).step


def test_modules_of_either_backend_load_what_the_other_saved(trainer: Trainer, tmp_path: Path) -> None:
    """Reference modules' first, as after an import on a CPU; then with state at another module, as on CUDA."""
    from sparsecod_megatron.checkpoint.untrusted import read_metadata

    plain = save(trainer, tmp_path / "plain")
    norm = keep_scales(trainer, 3.0, delayed=False)
    assert load(trainer, plain) == 1
    engines = save(trainer, tmp_path / "engines")
    assert not [key for key in read_metadata(engines).state_dict_metadata if "_extra_state" in key]
    norm.__class__ = norm.__class__.__base__
    assert load(trainer, engines) == 1


def test_delayed_scaling_resumes_with_its_scales(
    trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = save(trainer, tmp_path / "plain")
    norm = keep_scales(trainer, 3.0, delayed=True)
    with caplog.at_level("INFO", logger="sparsecod"):
        assert load(trainer, plain) == 1
    assert "the checkpoint holds no FP8 scales for 9 modules of this rank; theirs start afresh" in caplog.messages
    kept = save(trainer, tmp_path / "kept")
    norm.scale = torch.zeros(2)
    caplog.clear()
    with caplog.at_level("INFO", logger="sparsecod"):
        assert load(trainer, kept) == 1
    assert norm.scale.tolist() == [3.0, 2.0] and "FP8 scales" not in caplog.text


class Bomb:
    """Creates a folder where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("hidden", [False, True])
def test_scales_run_nothing(trainer: Trainer, tmp_path: Path, hidden: bool) -> None:
    """Not what they name, and not what the pickle inside a tensor's storage names."""
    bomb: Any = Bomb(tmp_path / "exploded")
    if hidden:
        content = pickle.dumps(bomb)

        class Nested:
            def __reduce__(self) -> tuple[Any, ...]:
                return torch.storage._load_from_bytes, (content,)

        bomb = Nested()
    keep_scales(trainer, 3.0, delayed=True, content={"scale_fwd": bomb})
    directory = save(trainer, tmp_path)
    with pytest.raises(CheckpointError, match=r"step_00000001: cannot be loaded \(UnpicklingError"):
        load(trainer, directory)
    assert not (tmp_path / "exploded").exists()


def test_random_states_of_another_kind_of_device_are_left(
    trainer: Trainer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generator of CUDA has a state of 16 bytes, one of the CPU 5,056."""
    from sparsecod_megatron.checkpoint import random_states

    local = random_states._local_states()
    of_cuda = {**local, "cuda": "00" * 16, "tracker": dict.fromkeys(local["tracker"], "00" * 16)}
    monkeypatch.setattr(random_states, "_local_states", lambda: of_cuda)
    directory = save(trainer, tmp_path)
    monkeypatch.undo()
    with caplog.at_level("INFO", logger="sparsecod"):
        assert load(trainer, directory) == 1
    assert "saved on another kind of device, so random states start from train.seed" in caplog.text
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        torch.rand(1)
