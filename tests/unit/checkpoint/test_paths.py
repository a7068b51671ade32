"""Which checkpoint a path means, and what a run may go on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsecod_megatron.checkpoint.paths import point_latest_to, resolve_step_dir, resume_candidates, step_dir_name
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
    assert resume_candidates(tmp_path / "checkpoints") == []
    first, second = step(tmp_path, 1), step(tmp_path, 12)
    point_latest_to(first)
    assert first.name == "step_00000001"
    for path in (tmp_path, tmp_path / "checkpoints", first):
        assert resolve_step_dir(path) == first
    point_latest_to(second)
    assert resolve_step_dir(tmp_path) == second
    assert resolve_step_dir(first) == first


def test_candidates_are_latest_and_what_is_before_it(tmp_path: Path) -> None:
    """A later step belongs to an attempt that is being redone; temporary and other names are none."""
    checkpoints = tmp_path / "checkpoints"
    steps = [step(tmp_path, number) for number in (1, 2, 100_000_000)]
    for other in ("step_00000003.tmp-00ff00ff", "step_00000003.old-00ff00ff", "step_4", "notes"):
        (checkpoints / other).mkdir()
    assert resume_candidates(checkpoints) == steps[::-1]
    point_latest_to(steps[1])
    assert resume_candidates(checkpoints) == [steps[1], steps[0]]
    assert not (checkpoints / "latest.tmp").exists()


@pytest.mark.parametrize("content", ["step_00000009\n", "", "../../elsewhere\n", "\udcff\x00"])
def test_a_pointer_to_nothing_falls_back(tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    directory = step(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").write_bytes(content.encode(errors="surrogateescape"))
    with caplog.at_level("WARNING", logger="sparsecod"):
        assert resolve_step_dir(tmp_path) == directory
    assert "step_00000001" in caplog.text


def test_what_is_gone_is_no_fresh_start(tmp_path: Path) -> None:
    step(tmp_path, 12)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000009\n")
    with pytest.raises(CheckpointError, match="step_00000009"):
        resume_candidates(tmp_path / "checkpoints")


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
        ("[]", "damaged"),
        ('{"format": 2}', "damaged"),
        ('{"format": 9}', "format 9"),
    ],
)
def test_damaged_state(tmp_path: Path, content: str | None, part: str) -> None:
    if content is not None:
        (tmp_path / "state.json").write_text(content)
    with pytest.raises(CheckpointError, match=part):
        read_state(tmp_path)
