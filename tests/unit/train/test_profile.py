"""A profile holds the steps that were asked for, with the names of layers, and changes nothing of the training."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from sparsecod_megatron.config import ProfileConfig, load_config
from sparsecod_megatron.errors import ConfigError
from tests.helpers.training import small_trainer, trainer_batches


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["profile.steps=[20]"], r"profile.steps: \[20\] is not two steps in order"),
        (["profile.steps=[23,20]"], "is not two steps in order, from 1"),
        (["profile.memory=true"], "profile.memory: true, but profile.steps traces none"),
        (["profile.layers=true"], "profile.layers: true, but profile.steps traces none"),
        (["profile.steps=[1,2]", "profile.ranks=[]"], r"profile.ranks: \[\] names no process"),
    ],
)
def test_profiles_of_nothing_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


def profiled(section: ProfileConfig, folder: Path, *, steps: range) -> list[float]:
    """Losses of the steps, profiled as the loop does it."""
    with small_trainer("model.num_layers=2") as trainer:
        from sparsecod_megatron.train.profile import StepProfiler
        from sparsecod_megatron.train.step import train_step

        data, losses = trainer_batches(trainer), []
        profiler = StepProfiler(section, folder, trainer.models, trainer.backend.device)
        with profiler.watching():
            for step in steps:
                profiler.begin(step)
                losses.append(train_step(trainer, data).loss)
                profiler.end(step)
        hooks = [module for module in trainer.models[0].modules() if module._forward_pre_hooks]
    assert not hooks, "what named the layers is gone"
    return losses


def names(path: Path) -> list[str]:
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if event.get("cat") == "user_annotation"]


def test_steps_and_layers_of_a_trace(tmp_path: Path) -> None:
    losses = profiled(ProfileConfig(steps=[2, 3], memory=True, layers=True), tmp_path, steps=range(1, 5))
    assert losses == profiled(ProfileConfig(), tmp_path / "plain", steps=range(1, 5))
    assert not (tmp_path / "plain").exists()
    trace, table = (tmp_path / "profile" / f"rank_0_from_step_2{suffix}" for suffix in (".json.gz", ".txt"))
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == sorted((trace.name, table.name))
    found = names(trace)
    # Two steps of two micro-batches.
    assert found.count("layer 0") == found.count("layer 1 mlp") == found.count("layer 1 self_attention") == 4
    assert "Self CPU Mem" in table.read_text() and "aten::mm" in table.read_text()


def test_a_run_that_ends_early_or_begins_late(tmp_path: Path) -> None:
    """What there was of the steps is written; a resumed run traces what is left of them."""
    profiled(ProfileConfig(steps=[2, 9]), tmp_path, steps=range(1, 4))
    profiled(ProfileConfig(steps=[2, 9]), tmp_path, steps=range(4, 6))
    profiled(ProfileConfig(steps=[2, 9]), tmp_path, steps=range(10, 12))
    written = sorted(path.name for path in (tmp_path / "profile").glob("*.txt"))
    assert written == ["rank_0_from_step_2.txt", "rank_0_from_step_4.txt"]


def test_a_rank_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="profile.ranks: 4, but the run has 1 processes"):
        profiled(ProfileConfig(steps=[1, 2], ranks=[0, 4]), tmp_path, steps=range(1))
