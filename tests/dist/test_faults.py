"""Whatever ends a process, the run continues from its last checkpoint as if it had not; errors are told once."""

from __future__ import annotations

import contextlib
import json
import os
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
from tests.helpers.cli import Started, read_jsonl, running_ranks, script_ranks, sparsecod_ranks
from tests.helpers.pace import PACE
from tests.helpers.running import ended_with_block, until
from tests.helpers.training import small_trainer

pytestmark = pytest.mark.dist

FAULTY = Path(__file__).parent / "faulty"
STEPS = 16
OVERRIDES = (
    f"train.train_steps={STEPS}",
    "train.spike_window=8",
    "checkpoint.save_interval=3",
    "statistics.variance.interval=0",
    "statistics.moments.interval=0",
    "statistics.norms.interval=0",
)


@pytest.fixture(scope="module")
def straight(bench: Bench) -> Path:
    """All steps on two processes that nothing disturbs."""
    return bench.train("undisturbed", *OVERRIDES, nproc=2)


def arguments(bench: Bench, name: str, *overrides: str) -> list[str]:
    return ["train", str(bench.config), f"logging.run_dir={bench.directory / name}", *OVERRIDES, *overrides]


@contextlib.contextmanager
def launched(arguments: list[str], *, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
    """The command as a user starts it: a process that starts two ranks; none of them outlives the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsecod_megatron", *arguments, "--nproc", "2"],
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


def ended(rank: Started) -> subprocess.CompletedProcess[str]:
    """What a rank leaves, once it has ended."""
    rank.process.join(PACE.patience_s)
    return rank.result()


def assert_continues_as_the_same_run(bench: Bench, run: Path, straight: Path) -> None:
    """The same command takes every step once; its numbers and what the judge of updates remembers are bit for bit."""
    bench.train(run.name, *OVERRIDES, nproc=2)
    assert [record["step"] for record in read_jsonl(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
    for field in ("step", "loss", "grad_norm", "lr", "tokens"):
        np.testing.assert_array_equal(series(run, field), series(straight, field), err_msg=field)
    states = [
        json.loads((folder / f"checkpoints/step_{STEPS:08d}/state.json").read_text())["train"]
        for folder in (run, straight)
    ]
    assert states[0] == states[1]
    assert len(states[0]["monitor"]["window"]["loss"]) == 8


def test_killed_it_restarts_by_itself_and_an_error_is_told_once(bench: Bench, straight: Path) -> None:
    """Rank 0 is killed before the first checkpoint; later rank 1 raises, which is once too often."""
    run, path = bench.directory / "killed", os.environ.get("PYTHONPATH", "")
    environment = {"PYTHONPATH": f"{FAULTY}{os.pathsep}{path}"}
    with launched(arguments(bench, "killed", "--max-restarts", "1"), environment=environment) as process:
        until(lambda: steps(run) >= 1, process)
        victim = ranks(process)[0]
        victim.kill()
        assert not list((run / "checkpoints").glob("step_*"))
        until(lambda: all(other.pid != victim.pid for other in ranks(process).values()), process)
        until(lambda: steps(run) >= 4, process)
        ranks(process)[1].send_signal(signal.SIGALRM)
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 1, errors
    assert "rank 0 was killed by SIGKILL; restart 1 of 1" in errors
    assert errors.splitlines()[-1] == "sparsecod train: rank 1 failed: RuntimeError: broken on purpose"
    assert errors.count("Traceback") == 1 and "Connection" not in errors
    assert_continues_as_the_same_run(bench, run, straight)


def test_killed_while_it_saves(bench: Bench, straight: Path) -> None:
    """Rank 0, while it writes the second checkpoint."""
    run = bench.directory / "saving"
    with running_ranks(*arguments(bench, "saving"), nproc=2) as (victim, _):
        until(lambda: steps(run) >= 4, victim)
        until(lambda: saving(run), victim)
        victim.process.kill()
        assert ended(victim).returncode == -signal.SIGKILL
    assert (run / "checkpoints/latest").read_text().strip() == "step_00000003"
    assert_continues_as_the_same_run(bench, run, straight)


def test_a_hung_step_says_which(bench: Bench, straight: Path) -> None:
    """Rank 1 is stopped; rank 0, waiting for it, says where and leaves its stacks."""
    run = bench.directory / "hung"
    limit = max(5, round(20 * series(straight, "step_time_s").max()))
    with running_ranks(*arguments(bench, "hung", f"train.step_timeout_s={limit}"), nproc=2) as (waiting, stopped):
        until(lambda: steps(run) >= 2, waiting)
        psutil.Process(stopped.process.pid).suspend()
        result = ended(waiting)
    assert result.returncode == 3, result.stderr
    phases = "forward and backward|optimizer|statistics|save|step boundary"
    assert re.search(
        rf"rank 0: step \d+: ({phases}) has not ended after {limit} s \(train.step_timeout_s\)", result.stderr
    )
    log = (run / "log.txt").read_text()
    assert re.search(rf"rank 0, step \d+, ({phases}):", log) and "in _step" in log


def test_a_signal_to_one_rank_stops_all(bench: Bench, straight: Path) -> None:
    """Slurm's warning, where it reaches a single rank: saved, exit 0, and the same command continues."""
    run = bench.directory / "warned"
    with running_ranks(*arguments(bench, "warned"), nproc=2) as started:
        until(lambda: steps(run) >= 4, started[0])
        psutil.Process(started[1].process.pid).send_signal(signal.SIGUSR1)
        results = [ended(rank) for rank in started]
    assert [result.returncode for result in results] == [0, 0], results[0].stderr
    stopped_at = steps(run)
    assert (run / f"checkpoints/step_{stopped_at:08d}").is_dir() and stopped_at < STEPS
    assert f"asked to stop at step {stopped_at}" in results[0].stderr
    assert_continues_as_the_same_run(bench, run, straight)


def test_a_second_start_is_told_and_the_first_continues(bench: Bench, straight: Path) -> None:
    """Two processes each; the second writes nothing. SIGTERM to the first's launcher: it saves, and a third resumes."""
    run = bench.directory / "twice"
    with launched(arguments(bench, "twice")) as process:
        until(lambda: steps(run) >= 2, process)
        first = ranks(process)
        for rank in first.values():
            rank.suspend()  # or it would have ended before the second has begun
        second = sparsecod_ranks(*arguments(bench, "twice", "train.seed=9"), nproc=2, check=False)
        assert second.returncode == 2, second.stderr
        assert re.fullmatch(
            rf"sparsecod train: logging.run_dir: {run} is in use by process {first[0].pid} on \S+, since .*; stop "
            "that, or choose another directory",
            second.stderr.splitlines()[-1],
        )
        for rank in first.values():
            rank.resume()
        until(lambda: steps(run) >= 4, process)
        process.terminate()
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 0 and f"asked to stop at step {steps(run)}" in errors, errors
    assert steps(run) < STEPS
    assert_continues_as_the_same_run(bench, run, straight)
    assert not (run / "run.lock").exists()


def test_a_signal_before_the_first_step(bench: Bench) -> None:
    with launched(arguments(bench, "unborn")) as process:
        until(lambda: len(ranks(process)) == 2, process)
        process.terminate()
        _, errors = process.communicate(timeout=PACE.patience_s)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.splitlines()[-1].startswith("sparsecod train: ended by SIGTERM before")


def test_a_disk_that_fills_up_costs_no_state(bench: Bench, straight: Path) -> None:
    """No file grows beyond 200 kB, as checkpoints do: told in the last line; the same command continues."""
    run = bench.directory / "full"
    with running_ranks(*arguments(bench, "full"), nproc=2) as started:
        until(lambda: (run / "checkpoints/latest").exists(), started[0])
        for rank in started:
            psutil.Process(rank.process.pid).rlimit(psutil.RLIMIT_FSIZE, (200_000, 200_000))
        results = [ended(rank) for rank in started]
    assert [result.returncode for result in results] == [2, 2], results[0].stderr
    assert re.search(r"step_\d+: not saved .*; earlier checkpoints are kept$", results[0].stderr.splitlines()[-1])
    left = (run / "checkpoints/latest").read_text().strip()
    assert (run / "checkpoints" / left / "state.json").exists() and left != f"step_{STEPS:08d}"
    assert_continues_as_the_same_run(bench, run, straight)


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
