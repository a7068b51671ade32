"""Checkpoints of runs that bucket and overlap their communication, as CUDA does by default, hold what was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsecod_megatron.backend import select_backend
from tests.dist.conftest import STEPS, Bench
from tests.dist.layouts import BUCKETS
from tests.dist.test_layouts import series
from tests.dist.test_resume import stopped_copy
from tests.helpers.cli import script_ranks

pytestmark = pytest.mark.dist
NARROW = ("model.hidden_size=72", "model.ffn_hidden_size=120", "schedule.lr_warmup_steps=0")
"""No bucket of this width is a multiple of 128."""


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def straight(request: pytest.FixtureRequest, bench: Bench) -> tuple[Path, tuple[str, ...]]:
    """Two processes, never stopped, and the settings of the run."""
    settings = (*NARROW, *BUCKETS, f"precision.dtype={request.param}")
    return bench.train(f"buckets-{request.param}", *settings, nproc=2), settings


@pytest.mark.parametrize("nproc", [2, 1])
def test_resumed_is_never_stopped(straight: tuple[Path, tuple[str, ...]], nproc: int, bench: Bench) -> None:
    """Bit for bit in the same layout, and closely in one process."""
    reference, settings = straight
    run = stopped_copy(reference, bench.directory / f"{reference.name}-resumed-{nproc}")
    bench.train(run.name, *settings, nproc=nproc)
    close = {"rtol": 1e-4 if "fp32" in reference.name else 3e-3}
    compare = np.testing.assert_array_equal if nproc == 2 else np.testing.assert_allclose
    compare(series(run, "loss"), series(reference, "loss"), **({} if nproc == 2 else close))


def test_weights_are_those_of_the_last_update(straight: tuple[Path, tuple[str, ...]]) -> None:
    """Every tensor of the file is its fp32 master in the model's type, read without Megatron-Core's own loading."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    reference, _ = straight
    tensors = _load_state_dict_from_keys(
        storage_reader=FileSystemReader(reference / "checkpoints" / f"step_{STEPS:08d}")
    )
    prefix = "optimizer.state.param."
    masters = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    assert len(masters) > 8
    for name, master in masters.items():
        assert torch.equal(master.to(tensors[name].dtype), tensors[name]), name


def test_random_states_of_replicas_are_stored_once(straight: tuple[Path, tuple[str, ...]]) -> None:
    state = json.loads((straight[0] / "checkpoints" / f"step_{STEPS:08d}" / "state.json").read_text())
    first, second = state["random_states"]
    assert isinstance(first, dict) and second == 0


def test_weights_that_nobody_gathered_are_not_written(repo_root: Path, tmp_path: Path) -> None:
    """Negative control: without the gather before a save, all ranks are told, and no file is left."""
    folder, told = tmp_path / "checkpoints", tmp_path / "told.json"
    folder.mkdir()
    script_ranks(repo_root / "tests/dist/stale_worker.py", folder, told, nproc=2)
    one, other = json.loads(told.read_text())
    assert one == other
    assert re.search(r"step_00000001: not saved \(the optimizer's fp32 weights of .* are not the model's\)", one)
    assert list(folder.iterdir()) == []


def test_upstream_still_counts_the_padding() -> None:
    """Fails once Megatron-Core cuts parameters out where they are: then `bucket_padding.py` goes."""
    select_backend()
    from tests.helpers.training import small_trainer, trainer_batches

    buckets = ("model.hidden_size=72", "model.ffn_hidden_size=120", *BUCKETS)
    with small_trainer(*buckets) as trainer:
        from sparsecod_megatron.checkpoint import native
        from sparsecod_megatron.train.step import train_step

        train_step(trainer, trainer_batches(trainer))
        (part,) = trainer.optimizer.chained_optimizers
        names = native._metadata(trainer.groups)
        state = native.model_sharded_state(trainer.models, trainer.groups)
        cut = part.sharded_state_dict(state, is_loading=False, metadata=names)["param_state"]
        parameters = [parameter for buffer in part.buffers for parameter in buffer.param_index_map]
        wrong = [not torch.equal(cut[i]["param"].data, parameter) for i, parameter in enumerate(parameters)]
        assert any(wrong)
