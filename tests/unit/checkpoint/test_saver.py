"""Saving in one process: asynchronous, given up in time, at step 0, and after writers that failed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch

from sparsecod_megatron.errors import CheckpointError
from tests.helpers.training import small_trainer, trainer_batches

if TYPE_CHECKING:
    from sparsecod_megatron.train.setup import Trainer

DROPOUT = ("model.num_layers=2", "model.hidden_dropout=0.2", "model.attention_dropout=0.1")


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    with small_trainer("model.num_layers=2") as trainer:
        yield trainer


def shards(directory: Path) -> dict[str, bytes]:
    """Tensors as they were written."""
    return {path.name: path.read_bytes() for path in directory.glob("*.distcp")}


def test_an_asynchronous_save_is_that_of_its_moment(tmp_path: Path) -> None:
    """Training goes on at once, with dropout: the same losses, and the files of a synchronous save."""
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import CheckpointSaver
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    losses: dict[bool, list[float]] = {}
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        setting = f"checkpoint.async_save={str(asynchronous).lower()}"
        with small_trainer(*DROPOUT, setting) as trainer, CheckpointSaver(folder, trainer) as saver:
            data = trainer_batches(trainer)
            losses[asynchronous] = []
            for step in range(1, 5):
                losses[asynchronous].append(train_step(trainer, data).loss)
                saver.poll()
                if step in (1, 2):
                    saver.save(TrainState(step=step, optimizer_steps=step))
            saver.finish()
            first, second = sorted(folder.glob("step_*"))
            assert (folder / "latest").read_text() == second.name + "\n"
            if asynchronous:
                load_checkpoint(first, trainer)
                rest = trainer_batches(trainer)
                next(rest[0]), next(rest[0])  # the batches of step 1
                assert [train_step(trainer, rest).loss for _ in range(3)] == losses[True][1:]
    assert losses[True] == losses[False]
    for step in ("step_00000001", "step_00000002"):
        assert shards(tmp_path / "True" / step) == shards(tmp_path / "False" / step)


def test_step_0_continues_as_if_it_had_not_been_saved(tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.native import load_checkpoint
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState
    from sparsecod_megatron.train.step import train_step

    with small_trainer("model.num_layers=2") as trainer:
        data = trainer_batches(trainer)
        expected = [train_step(trainer, data).loss for _ in range(2)]
    with small_trainer("model.num_layers=2") as trainer:
        saved = save_checkpoint(tmp_path, trainer, state=TrainState())
        data = trainer_batches(trainer)
        assert [train_step(trainer, data).loss for _ in range(2)] == expected
        assert load_checkpoint(saved, trainer) == TrainState()
        data = trainer_batches(trainer)
        assert [train_step(trainer, data).loss for _ in range(2)] == expected


def slow_write(*arguments: Any) -> None:
    """A disk that does not answer."""
    time.sleep(600)


def failing_write(*arguments: Any) -> None:
    """A writer that is killed before it has written."""
    raise SystemExit(1)


def test_a_save_that_takes_too_long(
    trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Named in one line; asynchronous goes on and saves again, synchronous raises; no process and no file is left."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from sparsecod_megatron.checkpoint.saver import CheckpointSaver
    from sparsecod_megatron.checkpoint.state import TrainState

    section = trainer.config.checkpoint
    section.async_save = True
    with CheckpointSaver(tmp_path, trainer) as saver:
        saver.save(TrainState(step=1))
        saver.wait()
        before = set(psutil.Process().children(recursive=True))
        section.save_timeout_s = 0.5
        with monkeypatch.context() as patch, caplog.at_level("WARNING", logger="sparsecod"):
            patch.setattr(FileSystemWriterAsync, "write_preloaded_data_multiproc", staticmethod(slow_write))
            saver.save(TrainState(step=2))
            time.sleep(0.6)
            saver.poll()
            assert [record.getMessage() for record in caplog.records] == [
                f"{tmp_path}/step_00000002: not saved (not written within checkpoint.save_timeout_s=0.5); "
                "earlier checkpoints are kept; training continues"
            ]
            section.async_save = False
            with pytest.raises(CheckpointError, match=r"step_00000003: not saved .*save_timeout_s=0.5"):
                saver.save(TrainState(step=3))
        assert set(psutil.Process().children(recursive=True)) <= before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
        section.save_timeout_s = 600
        saver.save(TrainState(step=4))
    assert (tmp_path / "latest").read_text() == "step_00000004\n"


def test_a_writer_that_dies_commits_nothing(trainer: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even asynchronous, the run does not end as if its last checkpoint were there."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from sparsecod_megatron.checkpoint.saver import CheckpointSaver
    from sparsecod_megatron.checkpoint.state import TrainState

    trainer.config.checkpoint.async_save = True
    monkeypatch.setattr(FileSystemWriterAsync, "write_preloaded_data_multiproc", staticmethod(failing_write))
    with (
        pytest.raises(CheckpointError, match="step_00000001: not saved"),
        CheckpointSaver(tmp_path, trainer) as saver,
    ):
        saver.save(TrainState(step=1))
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_deletes_what_a_crash_left(trainer: Trainer, tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.saver import CheckpointSaver

    left = tmp_path / "step_00000005.tmp-12345678"
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    CheckpointSaver(tmp_path, trainer)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_one_line(trainer: Trainer, tmp_path: Path) -> None:
    from sparsecod_megatron.checkpoint.saver import save_checkpoint
    from sparsecod_megatron.checkpoint.state import TrainState

    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"step_00000001: not saved \(Not a directory"):
        save_checkpoint(tmp_path / "checkpoints", trainer, state=TrainState(step=1))


def test_random_states_of_every_generator(tmp_path: Path) -> None:
    """torch, the tracker, Python and numpy draw the same again, the pending normal deviates included."""
    import random

    import numpy as np

    with small_trainer("model.num_layers=2"):
        from megatron.core.tensor_parallel import get_cuda_rng_tracker

        from sparsecod_megatron.checkpoint.random_states import gather_random_states, restore_random_states

        def draws() -> list[float]:
            with get_cuda_rng_tracker().fork():
                tracked = torch.rand(1).item()
            return [tracked, torch.rand(1).item(), random.gauss(), random.random(), np.random.randn(), np.random.rand()]

        random.gauss(), np.random.randn()  # each makes two and keeps one
        states = gather_random_states()
        expected = draws()
        assert draws() != expected
        restore_random_states(states)
        assert draws() == expected
