"""Lines on disk: whole, in order, and cut back to the resumed step."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.metrics import JsonlWriter
from sparsecod_megatron.metrics.writers import TrackerWriter


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@given(written=st.integers(0, 12), last=st.integers(0, 14), torn=st.booleans())
def test_resume_keeps_lines_until_its_step(
    tmp_path_factory: pytest.TempPathFactory, written: int, last: int, torn: bool
) -> None:
    """Neither duplicates nor gaps, also after a crash in the middle of a line."""
    path = tmp_path_factory.mktemp("writer") / "metrics.jsonl"
    writer = JsonlWriter(path, last_step=0)
    for step in range(1, written + 1):
        writer.write({"step": step, "loss": 1.0})
    writer.close()
    if torn:
        with path.open("a") as file:
            file.write('{"step": 99, "lo')
    resumed = JsonlWriter(path, last_step=last)
    resumed.write({"step": last + 1})
    resumed.close()
    assert steps(path) == [*range(1, min(written, last) + 1), last + 1]


def test_a_line_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "m.jsonl", last_step=0)
    writer.write({"step": 1})
    assert steps(tmp_path / "m.jsonl") == [1]
    writer.close()


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process may grow beyond `room` bytes while the block runs: the error of a full disk, but one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_wait_for_room_on_the_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The disk fills up in the middle of a line; nothing raises, one warning, and all lines are there in the end."""
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path, last_step=0)
    with full_disk(25):
        for step in range(1, 5):
            writer.write({"step": step})
    assert path.stat().st_size == 25
    assert len(caplog.messages) == 1 and "m.jsonl: cannot be written" in caplog.messages[0]
    writer.write({"step": 5})
    writer.close()
    assert steps(path) == [1, 2, 3, 4, 5]


def test_lines_that_never_found_room_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path, last_step=0)
    with full_disk(25):
        for step in range(1, 5):
            writer.write({"step": step})
        writer.close()
    assert "2 lines could not be written" in caplog.messages[-1]
    resumed = JsonlWriter(path, last_step=3)
    resumed.close()
    assert steps(path) == [1, 2], "the torn line is dropped"


class _Failing:
    """A tracker whose server goes away."""

    def __init__(self) -> None:
        self.calls = 0

    def write(self, record: Mapping[str, Any]) -> None:
        self.calls += 1
        if self.calls == 2:
            raise ConnectionError("gone")

    def close(self) -> None:
        self.calls += 1


def test_a_tracker_that_fails_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    tracker = _Failing()
    writer = TrackerWriter(tracker, "Curves")
    for step in range(5):
        writer.write({"step": step})
    writer.close()
    assert tracker.calls == 2
    assert caplog.messages == ["Curves fails (ConnectionError: gone) and gets no more metrics"]


def test_wandb_that_cannot_be_reached_is_kept_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses connections: one warning, an offline run, and the same identity for the next attempt."""
    wandb = pytest.importorskip("wandb")
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.metrics import writers

    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(writers, "WANDB_PATIENCE_S", 5.0)
    config = load_config(None, ["logging.wandb.mode=online"])
    identities = []
    for attempt in range(2):
        writer = writers.WandbWriter(config, tmp_path)
        identities.append(writer._run.id)
        writer.write({"step": attempt + 1, "loss": 1.0})
        writer.close()
    assert identities == [(tmp_path / "wandb_run_id").read_text().strip()] * 2
    ours = [record.getMessage() for record in caplog.records if record.name == "sparsecod"]
    assert [message.split(" (")[0] for message in ours] == ["Weights & Biases cannot be used"] * 2
    assert list(tmp_path.glob("wandb/offline-run-*")) and wandb.run is None


def test_wandb_offline_gets_flat_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, offline; what reaches it is read back from its run object."""
    wandb = pytest.importorskip("wandb")
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.metrics.writers import WandbWriter

    logged: list[tuple[dict[str, Any], int]] = []
    writer = WandbWriter(load_config(None, ["logging.wandb.mode=offline"]), tmp_path)
    original = wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, data, step: (logged.append((data, step)), original(self, data, step=step))[1]
    )
    writer.write({"step": 3, "layers": [{"layer": 0, "out_var": 0.5}, {"layer": 11, "out_var": 2.0}]})
    writer.write({"step": 3, "loss": 1.5})
    writer.close()
    assert logged == [({"layer/00/out_var": 0.5, "layer/11/out_var": 2.0}, 3), ({"loss": 1.5}, 3)]
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_tensorboard_reads_back(tmp_path: Path) -> None:
    """Event files, read with TensorBoard's own reader."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from sparsecod_megatron.metrics.writers import TensorBoardWriter

    writer = TensorBoardWriter(tmp_path, last_step=0)
    writer.write({"step": 1, "loss": 2.0})
    writer.write({"step": 2, "layers": [{"layer": 3, "out_var": 0.5, "tokens_per_expert": [4.0, 6.0]}]})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = {tag: (events.Scalars(tag)[0].step, events.Scalars(tag)[0].value) for tag in events.Tags()["scalars"]}
    assert found == {
        "loss": (1, 2.0),
        "layer/03/out_var": (2, 0.5),
        "layer/03/tokens_per_expert/0": (2, 4.0),
        "layer/03/tokens_per_expert/1": (2, 6.0),
    }
