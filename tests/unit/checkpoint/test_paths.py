"""Which checkpoint a path means."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecod_megatron.checkpoint.paths import latest_step_dir, point_latest_to, resolve_step_dir, step_dir_name
from sparsecod_megatron.checkpoint.state import StateFile, TrainState, read_state, write_state
from sparsecod_megatron.errors import CheckpointError


def step(run: Path, number: int) -> Path:
    directory = run / "checkpoints" / step_dir_name(number)
    directory.mkdir(parents=True)
    write_state(
        StateFile(TrainState(step=number, consumed_tokens=5), {"num_steps": number}, {"world_size": 1}), directory
    )
    return directory


def test_latest_and_names(tmp_path: Path) -> None:
    assert latest_step_dir(tmp_path / "checkpoints") is None
    first, second = step(tmp_path, 1), step(tmp_path, 12)
    point_latest_to(first)
    assert first.name == "step_00000001"
    for path in (tmp_path, tmp_path / "checkpoints", first):
        assert resolve_step_dir(path) == first
    point_latest_to(second)
    assert resolve_step_dir(tmp_path) == second
    assert resolve_step_dir(first) == first


def test_state_round_trip(tmp_path: Path) -> None:
    directory = step(tmp_path, 3)
    state = read_state(directory)
    assert state.train == TrainState(step=3, consumed_tokens=5)
    assert (state.scheduler, state.layout) == ({"num_steps": 3}, {"world_size": 1})


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "not a complete checkpoint"),
        ("{", "damaged"),
        ('{"format": 1}', "damaged"),
        ('{"format": 9}', "format 9"),
    ],
)
def test_damaged_state(tmp_path: Path, content: str | None, part: str) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=part):
        read_state(tmp_path)


def test_latest_names_what_is_gone(tmp_path: Path) -> None:
    step(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match="step_00000009"):
        resolve_step_dir(tmp_path)
