"""Lines on disk: whole, in order, and cut back to the resumed step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.metrics import JsonlWriter


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
