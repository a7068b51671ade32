"""A run stopped and resumed is the run that was never stopped: bit for bit in the same layout, closely in another."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.dist.conftest import MODELS, SAVED, STEPS, Bench
from tests.dist.layouts import BUCKETS, EP2, LARGE_LAYOUTS, SP, TP2, Layout
from tests.dist.test_layouts import assert_statistics_equal, series
from tests.helpers.cli import read_jsonl

pytestmark = pytest.mark.dist


def stopped_copy(reference: Path, target: Path) -> Path:
    """The reference run as it was at its first checkpoint, with later lines that a resume must drop."""
    shutil.copytree(reference, target)
    shutil.rmtree(target / "checkpoints" / f"step_{STEPS:08d}")
    (target / "checkpoints" / "latest").write_text(f"step_{SAVED:08d}\n")
    return target


DROPOUT = ("model.hidden_dropout=0.1", "model.attention_dropout=0.1")
WALL_CLOCK = ("tokens_per_s", "tflops", "step_time_s")
LAYOUTS = {"dp2": BUCKETS, "tp2-sp": (TP2, SP, *BUCKETS)}
"""With CUDA's default communication."""


@pytest.fixture(scope="module")
def straight(bench: Bench, initial: dict[str, Path]) -> Callable[[str], Path]:
    """A mixture with dropout on two processes, never stopped, by layout."""

    @functools.cache
    def run(layout: str) -> Path:
        settings = (f"checkpoint.init_from={initial['moe']}", *MODELS["moe"], *DROPOUT, *LAYOUTS[layout])
        return bench.train(f"dropout-{layout}", *settings, nproc=2)

    return run


def outcome(run: Path) -> dict[str, Any]:
    """What a run leaves, without what the clock says: metrics, statistics, tensors, and the rest of its last state."""
    last = run / "checkpoints" / f"step_{STEPS:08d}"
    metrics = [
        {name: value for name, value in record.items() if name not in WALL_CLOCK}
        for record in read_jsonl(run / "metrics.jsonl")
    ]
    return {
        "metrics": metrics,
        "statistics": (run / "layer_statistics.jsonl").read_bytes(),
        "state": json.loads((last / "state.json").read_text()),
        **{path.name: path.read_bytes() for path in last.glob("*.distcp")},
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_layout_is_bitwise(layout: str, bench: Bench, straight: Callable[[str], Path]) -> None:
    """Metrics, statistics, weights, optimizer and every rank's random states, equal in every bit and byte.

    The resumed run saves asynchronously, so this also says that it makes no difference. A dense model without dropout
    does the same in test_buckets.py and test_faults.py.
    """
    run = stopped_copy(straight(layout), bench.directory / f"resumed-{layout}")
    bench.train(run.name, *MODELS["moe"], *DROPOUT, *LAYOUTS[layout], "checkpoint.async_save=true", nproc=2)
    ours, theirs = outcome(run), outcome(straight(layout))
    assert len(ours) > 3 and len(ours["state"]["random_states"]) == 2
    for name, expected in theirs.items():
        assert ours[name] == expected, name


def changed_state(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change state.json of the first checkpoint, and say so in its manifest."""
    from sparsecod_megatron.checkpoint.manifest import write_manifest

    path = run / "checkpoints" / f"step_{SAVED:08d}" / "state.json"
    state = json.loads(path.read_text())
    change(state)
    path.write_text(json.dumps(state))
    write_manifest(path.parent, {})


def test_a_wrong_random_state_shows(bench: Bench, straight: Callable[[str], Path]) -> None:
    """Negative control: one rank of two draws other dropout masks."""
    run = stopped_copy(straight("dp2"), bench.directory / "wrong-random-state")

    def other_generator(state: dict[str, Any]) -> None:
        other = torch.Generator().manual_seed(99).get_state()
        state["random_states"][1] = state["random_states"][0] | {"cpu": bytes(other.numpy()).hex()}

    changed_state(run, other_generator)
    bench.train(run.name, *MODELS["moe"], *DROPOUT, *LAYOUTS["dp2"], nproc=2)
    ours, theirs = series(run, "loss"), series(straight("dp2"), "loss")
    np.testing.assert_array_equal(ours[:SAVED], theirs[:SAVED])
    assert (ours[SAVED:] != theirs[SAVED:]).all()


@pytest.mark.parametrize("layout", LARGE_LAYOUTS, ids=lambda layout: layout.name)
def test_other_layout_continues(layout: Layout, bench: Bench, reference: dict[str, Path]) -> None:
    """From one process to many: the same losses to 1e-4, statistics to 1e-5."""
    single = reference[layout.model]
    run = stopped_copy(single, bench.directory / f"resumed-{layout.name}")
    bench.train(run.name, *MODELS[layout.model], *layout.overrides, nproc=layout.nproc)
    np.testing.assert_allclose(series(run, "loss"), series(single, "loss"), rtol=1e-4)
    assert_statistics_equal(run, single, rtol=1e-5)


def test_many_processes_to_one(bench: Bench, initial: dict[str, Path], reference: dict[str, Path]) -> None:
    """Experts over two ranks, optimizer state and all, gathered into one process."""
    name = "ep2-to-one"
    settings = (f"checkpoint.init_from={initial['moe']}", *MODELS["moe"], EP2, *BUCKETS, f"train.exit_step={SAVED}")
    bench.train(name, *settings, nproc=2)
    run = bench.train(name, *MODELS["moe"])
    np.testing.assert_allclose(series(run, "loss"), series(reference["moe"], "loss"), rtol=1e-4)


def test_a_wrong_optimizer_step_shows(bench: Bench, reference: dict[str, Path]) -> None:
    """Negative control: Adam's bias correction started anew, as a resume that loses its step count would."""
    run = stopped_copy(reference["dense"], bench.directory / "wrong-step")
    changed_state(run, lambda state: state["train"].update(optimizer_steps=0))
    bench.train(run.name)
    ours, theirs = series(run, "loss"), series(reference["dense"], "loss")
    np.testing.assert_array_equal(ours[: SAVED + 1], theirs[: SAVED + 1])
    assert np.abs(ours[SAVED + 2 :] - theirs[SAVED + 2 :]).max() > 1e-3
