"""Whatever ends a process, the run goes on from its last checkpoint as if nothing had; what went wrong is said once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from tests.dist import faults_worker
from tests.dist.conftest import Bench
from tests.dist.test_layouts import series
from tests.helpers.cli import read_jsonl, script_ranks
from tests.helpers.pace import PACE
from tests.helpers.running import ended_with_block, until
from tests.helpers.training import small_trainer

pytestmark = pytest.mark.dist

FAULTY = Path(__file__).parent / "faulty"
OVERRIDES = (
    "train.train_steps=24",
    "train.spike_window=8",
    "checkpoint.save_interval=3",
    "statistics.variance.interval=0",
    "statistics.moments.interval=0",
    "statistics.norms.interval=0",
)
KILLS = 2


@pytest.fixture(scope="module")
def straight(bench: Bench) -> Path:
    """Twenty-four steps on two processes that nothing disturbs."""
    return bench.train("undisturbed", *OVERRIDES, nproc=2)


def arguments(bench: Bench, name: str, *overrides: str) -> list[str]:
    return ["train", str(bench.config), f"logging.run_dir={bench.directory / name}", *OVERRIDES, *overrides]


@contextlib.contextmanager
def started(
    arguments: list[str], *, environment: dict[str, str] | None = None, program: str = "sparsecod_megatron"
) -> Iterator[subprocess.Popen[str]]:
    """A command in a process of its own, which does not outlive the block, nor do the ranks that it starts."""
    process = subprocess.Popen(
        [sys.executable, "-m", program, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (environment or {}),
    )
    with ended_with_block(process):
        yield process


def ranks(process: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    """Processes of the run by rank; those that saving or loading starts are not among them."""
    found = {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                found[int(child.environ().get("RANK", -1))] = child
    found.pop(-1, None)
    return found


def steps(run: Path) -> int:
    """Last step that metrics.jsonl tells of."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    with contextlib.suppress(ValueError):
        return int(json.loads(lines[-1])["step"]) if lines else 0
    return 0


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    folder = run / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return any(not re.fullmatch(r"step_\d+|latest", name) for name in names)


def assert_same_run(run: Path, straight: Path) -> None:
    """Every step once, its numbers and what the judge of updates remembers bit for bit."""
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == list(range(1, 25))
    for field in ("step", "loss", "grad_norm", "lr", "tokens"):
        np.testing.assert_array_equal(series(run, field), series(straight, field), err_msg=field)
    states = [
        json.loads((folder / "checkpoints/step_00000024/state.json").read_text())["train"] for folder in (run, straight)
    ]
    assert states[0] == states[1]
    assert len(states[0]["monitor"]["window"]["loss"]) == 8


def test_killed_at_any_moment_resumes_by_itself(bench: Bench, straight: Path) -> None:
    """Kills of random ranks: one before the first checkpoint, one while one is written."""
    chance, run = random.Random(5), bench.directory / "killed"
    with started(arguments(bench, "killed", "--nproc", "2", "--max-restarts", str(KILLS))) as process:
        for kill in range(KILLS):
            until(lambda: len(ranks(process)) == 2, process)
            victim = chance.choice(list(ranks(process).values()))
            begin, distance = steps(run), 1 if kill == 0 else chance.randint(2, 6)
            until(lambda: steps(run) != begin, process)  # noqa: B023 - called at once
            begin = steps(run)
            until(lambda: steps(run) >= begin + distance - 1, process)  # noqa: B023
            if kill == 1:
                until(lambda: saving(run), process)
            victim.kill()
            until(lambda: all(other.pid != victim.pid for other in ranks(process).values()), process)  # noqa: B023
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 0, errors
    told = re.findall(r"rank [01] was killed by SIGKILL; restart (\d) of 2", errors)
    assert told == ["1", "2"] and "Traceback" not in errors
    assert_same_run(run, straight)


def test_one_rank_raising_is_told_once_and_soon(bench: Bench) -> None:
    run, path = bench.directory / "raising", os.environ.get("PYTHONPATH", "")
    environment = {"PYTHONPATH": f"{FAULTY}{os.pathsep}{path}"}
    with started(arguments(bench, "raising", "--nproc", "2"), environment=environment) as process:
        until(lambda: steps(run) >= 2, process)
        ranks(process)[1].send_signal(signal.SIGALRM)
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 1, errors
    assert errors.splitlines()[-1] == "sparsecod train: rank 1 failed: RuntimeError: broken on purpose"
    assert errors.count("Traceback") == 1 and "Connection" not in errors


def test_a_hung_step_says_which(bench: Bench, straight: Path) -> None:
    """Rank 1 is stopped; rank 0, waiting for it, names step and phase and leaves its stacks."""
    run = bench.directory / "hung"
    limit = max(5, round(20 * series(straight, "step_time_s").max()))
    with started(arguments(bench, "hung", f"train.step_timeout_s={limit}", "--nproc", "2")) as process:
        until(lambda: steps(run) >= 2, process)
        waiting, stopped = (ranks(process)[rank] for rank in (0, 1))
        stopped.suspend()
        until(lambda: "has not ended" in (run / "log.txt").read_text(), process)
        psutil.wait_procs([waiting], timeout=PACE.patience_s)
        with contextlib.suppress(psutil.NoSuchProcess):  # the launcher may have killed it by now
            stopped.resume()
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 1, errors
    assert errors.splitlines()[-1] == "sparsecod train: rank 0 exited with status 3; see its output above"
    phases = "forward and backward|optimizer|statistics|save|step boundary"
    assert re.search(rf"rank 0: step \d+: ({phases}) has not ended after {limit} s \(train.step_timeout_s\)", errors)
    log = (run / "log.txt").read_text()
    assert re.search(rf"rank 0, step \d+, ({phases}):", log) and "in _step" in log


def test_a_signal_to_one_rank_stops_all(bench: Bench, straight: Path) -> None:
    """Slurm's warning, where it reaches a single rank: saved, exit 0, and the same command goes on."""
    run = bench.directory / "warned"
    with started(arguments(bench, "warned", "--nproc", "2")) as process:
        until(lambda: steps(run) >= 4, process)
        ranks(process)[1].send_signal(signal.SIGUSR1)
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 0, errors
    stopped_at = steps(run)
    assert (run / f"checkpoints/step_{stopped_at:08d}").is_dir() and stopped_at < 24
    assert f"asked to stop at step {stopped_at}" in errors
    bench.train("warned", *OVERRIDES, nproc=2)
    assert_same_run(run, straight)


def test_a_second_start_is_told_and_the_first_goes_on(bench: Bench, straight: Path) -> None:
    """Two processes each; the second writes nothing. SIGTERM to the first's launcher: it saves, and a third resumes."""
    run = bench.directory / "twice"
    with started(arguments(bench, "twice", "--nproc", "2")) as process:
        until(lambda: steps(run) >= 2, process)
        first = ranks(process)
        for rank in first.values():
            rank.suspend()  # or it would have ended before the second has begun
        with started(arguments(bench, "twice", "train.seed=9", "--nproc", "2")) as second:
            _, errors = second.communicate(timeout=PACE.patience_s)
        assert second.returncode == 2, errors
        assert re.fullmatch(
            rf"sparsecod train: logging.run_dir: {run} is in use by process {first[0].pid} on \S+, since .*; stop "
            "that, or choose another directory",
            errors.splitlines()[-1],
        )
        for rank in first.values():
            rank.resume()
        until(lambda: steps(run) >= 4, process)
        process.terminate()
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 0 and f"asked to stop at step {steps(run)}" in errors, errors
    assert steps(run) < 24
    bench.train("twice", *OVERRIDES, nproc=2)
    assert_same_run(run, straight)
    assert not (run / "run.lock").exists()


def test_a_signal_before_the_first_step(bench: Bench) -> None:
    with started(arguments(bench, "unborn", "--nproc", "2")) as process:
        until(lambda: len(ranks(process)) == 2, process)
        process.terminate()
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].startswith("sparsecod train: ended by SIGTERM before")


def test_a_disk_that_fills_up_costs_no_state(bench: Bench, straight: Path) -> None:
    """No file grows beyond 200 kB, as checkpoints do: told in the last line; the same command goes on."""
    run = bench.directory / "full"
    with started(arguments(bench, "full", "--nproc", "2")) as process:
        until(lambda: (run / "checkpoints/latest").exists(), process)
        for rank in ranks(process).values():
            rank.rlimit(psutil.RLIMIT_FSIZE, (200_000, 200_000))
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 2, errors
    assert re.search(r"step_\d+: not saved .*; earlier checkpoints are kept$", errors.splitlines()[-1])
    left = (run / "checkpoints/latest").read_text().strip()
    assert (run / "checkpoints" / left / "state.json").exists() and left != "step_00000024"
    bench.train("full", *OVERRIDES, nproc=2)
    assert_same_run(run, straight)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> dict[str, Any]:
    """What the worker found on two data-parallel ranks."""
    output = tmp_path_factory.mktemp("faults") / "found.json"
    script_ranks(repo_root / "tests/dist/faults_worker.py", output, nproc=2)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_a_loss_that_is_no_number_on_one_rank_is_skipped_on_all(two_ranks: dict[str, Any]) -> None:
    usual = {"diverged": False, "update": True, "changed": True, "finite": True}
    skipped = {"diverged": True, "update": False, "changed": False, "finite": True}
    assert two_ranks["verdicts"] == [[usual, skipped, usual]] * 2


def test_gradient_spikes_of_two_ranks_are_those_of_one(two_ranks: dict[str, Any]) -> None:
    """The distributed optimizer's halves count every element once."""
    with small_trainer(*faults_worker.RUN) as trainer:
        expected = faults_worker.spikes(trainer)
    assert expected[0] == [{}] * 3 == two_ranks["spikes"][0]
    assert any(layer["spike_frac"] > 0 for layers in expected[1:] for layer in layers)
    for ours, theirs in zip(two_ranks["spikes"][1:], expected[1:], strict=True):
        for layer, other in zip(ours, theirs, strict=True):
            assert layer["spike_frac"] == pytest.approx(other["spike_frac"], rel=0.02, abs=1e-4)
            assert layer["spike_max"] == pytest.approx(other["spike_max"], rel=1e-2)
