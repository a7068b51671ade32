"""A run stopped and resumed is the run that was never stopped: bit for bit in the same layout, closely in another."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.dist.conftest import MODELS, Bench
from tests.dist.layouts import EP2, PP2, SP, TP2
from tests.dist.test_layouts import assert_statistics_equal, series, statistics

pytestmark = pytest.mark.dist


def stopped_copy(reference: Path, target: Path) -> Path:
    """The reference run as it was when it saved step 10, with later lines that a resume must drop."""
    shutil.copytree(reference, target)
    shutil.rmtree(target / "checkpoints" / "step_00000020")
    (target / "checkpoints" / "latest").write_text("step_00000010\n")
    return target


@pytest.mark.parametrize("model", MODELS)
def test_same_layout_is_bitwise(model: str, bench: Bench, reference: dict[str, Path]) -> None:
    """Losses, gradient norms and statistics of steps 11-20 are equal as numbers, not nearly."""
    run = stopped_copy(reference[model], bench.directory / f"resumed-{model}")
    bench.train(run.name, *MODELS[model])
    for field in ("step", "loss", "grad_norm", "lr", "tokens"):
        np.testing.assert_array_equal(series(run, field), series(reference[model], field), err_msg=field)
    expected = statistics(reference[model])
    for name, values in statistics(run).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize(
    ("model", "overrides", "nproc"),
    [
        pytest.param("dense", (TP2, PP2), 4, id="one-to-tp2-pp2"),
        pytest.param("moe", (EP2, TP2, SP), 4, id="one-to-ep2-tp2"),
    ],
)
def test_other_layout_continues(
    model: str, overrides: tuple[str, ...], nproc: int, bench: Bench, reference: dict[str, Path]
) -> None:
    """From one process to many: the same losses to 1e-4, statistics to 1e-4."""
    run = stopped_copy(reference[model], bench.directory / f"resumed-{model}-{nproc}")
    bench.train(run.name, *MODELS[model], *overrides, nproc=nproc)
    np.testing.assert_allclose(series(run, "loss"), series(reference[model], "loss"), rtol=1e-4)
    assert_statistics_equal(run, reference[model], rtol=1e-4)


def test_many_processes_to_one(bench: Bench, initial: dict[str, Path], reference: dict[str, Path]) -> None:
    """Experts over two ranks, optimizer state and all, gathered into one process."""
    name = "ep2-to-one"
    bench.train(name, f"checkpoint.init_from={initial['moe']}", *MODELS["moe"], EP2, "train.exit_step=10", nproc=2)
    run = bench.train(name, *MODELS["moe"])
    np.testing.assert_allclose(series(run, "loss"), series(reference["moe"], "loss"), rtol=1e-4)


def test_a_wrong_optimizer_step_shows(bench: Bench, reference: dict[str, Path]) -> None:
    """Negative control: Adam's bias correction started anew, as a resume that loses its step count would."""
    run = stopped_copy(reference["dense"], bench.directory / "wrong-step")
    path = run / "checkpoints" / "step_00000010" / "state.json"
    state = json.loads(path.read_text())
    state["train"]["optimizer_steps"] = 0
    path.write_text(json.dumps(state))
    bench.train(run.name)
    ours, theirs = series(run, "loss"), series(reference["dense"], "loss")
    np.testing.assert_array_equal(ours[:11], theirs[:11])
    assert np.abs(ours[12:] - theirs[12:]).max() > 1e-3


@pytest.mark.parametrize("nproc", [1, 2])
def test_sigterm_saves_and_the_same_command_goes_on(nproc: int, bench: Bench, initial: dict[str, Path]) -> None:
    """Exit 0 with a checkpoint of the last whole step; resumed, the run ends as if it had never been asked."""
    overrides = (f"checkpoint.init_from={initial['dense']}", "train.train_steps=60", "checkpoint.save_interval=0")
    straight = bench.train(f"straight-{nproc}", *overrides, nproc=nproc)
    run = bench.directory / f"stopped-{nproc}"
    command = [sys.executable, "-m", "sparsecod_megatron", "train", str(bench.config), f"logging.run_dir={run}"]
    process = subprocess.Popen([*command, *overrides, "--nproc", str(nproc)], stderr=subprocess.PIPE, text=True)
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 3:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    stopped_at = len(series(run, "step"))
    assert 3 <= stopped_at < 60 and f"asked to stop at step {stopped_at}" in errors
    bench.train(run.name, *overrides, nproc=nproc)
    np.testing.assert_array_equal(series(run, "loss"), series(straight, "loss"))
