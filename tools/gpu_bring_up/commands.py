"""The commands of the README on one card, as a user types them: train, resume, export, import.

Chains of commands are independent and mostly wait for imports, so on a card they run at once; in a rehearsal one after
another, forked.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sparsecod_megatron.cli.main import main as sparsecod
from sparsecod_megatron.config.run_files import METRICS_FILE, STATISTICS_FILE
from tools.gpu_bring_up.bench import Bench, Finding
from tools.gpu_bring_up.environment import ENGINE_SITE
from tools.gpu_bring_up.packed import read_packed
from tools.gpu_bring_up.process import ROOT, forked, fresh
from tools.gpu_bring_up.sizes import Sizes, sizes

TIMEOUT_S = 80.0
"""Time limit of one command."""
CONFIGS = ROOT / "examples/configs"
ENGINELESS_RUN = "nano dense without Transformer Engine"
DENSE, ENGINELESS = "dense", "without_engine"
"""Run directories, in the scratch folder."""
STATISTICS_OVERRIDES = tuple(f"statistics.{group}.interval=1" for group in ("variance", "moments", "norms", "spikes"))
WINDOW_KEYS = ("data.reset_attention_mask=true", "data.reset_position_ids=true", "model.sliding_window=16")
LOSS_TOLERANCE = 1e-3
"""Relative difference of losses that non-deterministic kernels may leave within 30 steps."""
DEVICE_TOLERANCE = 2e-2
"""The same between CPU and card, and with and without Transformer Engine, after a few steps."""
STEPS_AFTER_LOAD = 3
"""Steps that a checkpoint from elsewhere is trained on."""


@dataclass(frozen=True)
class Commands:
    """Starts `sparsecod`.

    Attributes:
        bench: of this step.
        name: of the chain, for its checks.
    """

    bench: Bench
    name: str

    def run(self, *arguments: str | Path, hide_card: bool = False, hide_engine: bool = False) -> None:
        """Run one command.

        Args:
            arguments: of `sparsecod`.
            hide_card: from the command, which then computes on the CPU.
            hide_engine: take Transformer Engine off its path.

        Raises:
            RuntimeError: with the command's last words, if it failed.
        """
        words, environment = [*map(str, arguments)], dict(os.environ)
        if hide_card:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        if hide_engine:
            path = environment.get("PYTHONPATH", "").split(os.pathsep)
            kept = [entry for entry in path if entry != str(self.bench.work / ENGINE_SITE)]
            environment["PYTHONPATH"] = os.pathsep.join(kept)
        log = self.bench.work / f"command_{time.monotonic_ns()}.log"
        options: dict[str, Any] = {"environment": environment, "log": log, "own_group": False}
        options["timeout_s"] = TIMEOUT_S * self.bench.pace
        if self.bench.cuda:
            status = fresh(["-m", "sparsecod_megatron", *words], **options)
        else:
            status = forked(sparsecod, words, **options)
        printed = log.read_text(errors="replace")
        print(f"$ sparsecod {' '.join(words)}\n{printed[-4000:]}", flush=True)
        if status != 0:
            last = [line for line in printed.splitlines() if line.strip()][-1:] or ["it printed nothing"]
            raise RuntimeError(f"{words[0]}: {'killed' if status is None else f'exit {status}'}: {last[0]}")

    def train(self, config: str, run_dir: Path, *overrides: str, **hidden: bool) -> None:
        """`sparsecod train` without validation, every step in the log."""
        indices = f"data.cache_dir={run_dir}_indices"  # its own, which other runs need not wait for
        common = ("train.eval_interval=0", "logging.log_interval=1", f"logging.run_dir={run_dir}", indices)
        self.run("train", CONFIGS / config, *common, *overrides, **hidden)


def run(bench: Bench) -> None:
    """All chains; each makes its own checks."""
    chains: dict[str, Callable[[Bench, Commands], None]] = {
        "nano dense": _dense,
        "nano MoE with window and document mask": _moe,
        "CPU checkpoint": _from_cpu,
        ENGINELESS_RUN: _without_engine,
    }
    _together(bench, *(partial(chain, bench, Commands(bench, name)) for name, chain in chains.items()))
    with bench.check(f"{ENGINELESS_RUN}: against with it") as found:
        bench.require_transformer_engine()
        halfway = sizes(bench.cuda).halfway
        with_engine = _losses(bench.work / f"{DENSE}_straight")[:halfway]
        _compare(found, _losses(bench.work / ENGINELESS), with_engine, count=halfway, tolerance=DEVICE_TOLERANCE)


def _together(bench: Bench, *actions: Callable[[], None]) -> None:
    """At once on a card; in a rehearsal one after another, since a fork is taken of a process with one thread."""
    if not bench.cuda:
        for action in actions:
            action()
        return
    with ThreadPoolExecutor(max_workers=len(actions)) as pool:
        futures = [pool.submit(action) for action in actions]
    for future in futures:
        future.result()


def _dense(bench: Bench, commands: Commands) -> None:
    run_dir = bench.work / DENSE
    _resumed(bench, commands, "nano_dense.yaml", run_dir, *STATISTICS_OVERRIDES, "checkpoint.async_save=true")
    exported = bench.work / "exported_dense"
    with bench.check(f"{commands.name}: export with verify") as found:
        _export(commands, run_dir, exported, found)
    with bench.check(f"{commands.name}: import on the CPU, train on from it") as found:
        imported, again = bench.work / "imported", bench.work / "from_imported"
        config = run_dir / "config.yaml"
        commands.run("import", "--hf", exported, "--output", imported, "--config", config, hide_card=True)
        start = (f"checkpoint.init_from={imported}", f"logging.run_dir={again}", f"train.exit_step={STEPS_AFTER_LOAD}")
        commands.run("train", imported / "config.yaml", *start)
        found.figure = f"losses {_shown(_losses(again))} behind {_losses(run_dir)[-1]:.4f}"
        assert abs(_losses(again)[0] / _losses(run_dir)[-1] - 1) < 0.1, found.figure


def _moe(bench: Bench, commands: Commands) -> None:
    run_dir = bench.work / "moe"
    router = ("statistics.router.interval=1", "parallel.expert_model_parallel_size=1")
    _resumed(bench, commands, "nano_moe.yaml", run_dir, *STATISTICS_OVERRIDES, *router, *WINDOW_KEYS)
    with bench.check(f"{commands.name}: export with verify") as found:
        _export(commands, run_dir, bench.work / "exported_moe", found)


def _resumed(bench: Bench, commands: Commands, config: str, run_dir: Path, *overrides: str) -> None:
    """Half of a run and the rest of it, against the run in one go."""
    size, straight = sizes(bench.cuda), run_dir.with_name(f"{run_dir.name}_straight")
    common = _common(bench, size, *overrides)

    def halves() -> None:
        with bench.check(f"{commands.name}: {size.halfway} steps, every statistic each step") as found:
            commands.train(config, run_dir, *common, f"train.exit_step={size.halfway}")
            losses = _losses(run_dir)
            found.figure = f"loss {losses[0]:.3f} to {losses[-1]:.3f}"
            assert len(losses) == size.halfway, f"{len(losses)} lines of metrics"
            _require_statistics(run_dir, size.halfway)
        with bench.check(f"{commands.name}: resumed to {size.last}"):
            commands.train(config, run_dir, *common, f"train.exit_step={size.last}")

    def in_one_go() -> None:
        with bench.check(f"{commands.name}: {size.last} steps in one go"):
            commands.train(config, straight, *common, "checkpoint.async_save=false", f"train.exit_step={size.last}")

    _together(bench, halves, in_one_go)
    with bench.check(f"{commands.name}: resumed, against in one go") as found:
        _compare(found, _losses(run_dir), _losses(straight), count=size.last, tolerance=LOSS_TOLERANCE)


def _export(commands: Commands, run_dir: Path, output: Path, found: Finding) -> None:
    commands.run("export", "--checkpoint", run_dir, "--output", output)
    parity = json.loads((output / "parity.json").read_text())["random"]
    found.values = {name: parity[name] for name in ("max_difference", "tolerance", "argmax_agreement")}
    found.figure = f"largest difference of a logit {parity['max_difference']:.1e}, allowed {parity['tolerance']:.1e}"


def _from_cpu(bench: Bench, commands: Commands) -> None:
    """The packed checkpoint trained on here and, for comparison, with the card hidden; then back on the CPU."""
    packed = read_packed(bench.folder)
    here, cpu = bench.work / "from_cpu", bench.work / "on_cpu"
    last = packed.steps + STEPS_AFTER_LOAD

    def train(run_dir: Path, until: int, **hidden: bool) -> None:
        prefix = f"data.prefix={packed.prefix}"
        commands.train("nano_dense.yaml", run_dir, *packed.overrides, prefix, f"train.exit_step={until}", **hidden)

    def on_cpu() -> None:
        with bench.check("CPU checkpoint: continues on the CPU"):
            shutil.copytree(packed.run_dir, cpu)
            train(cpu, last + 1, hide_card=True)

    def on_card() -> None:
        with bench.check("CPU checkpoint: continues on the card"):
            shutil.copytree(packed.run_dir, here)
            train(here, last)

    _together(bench, on_card, on_cpu)
    with bench.check("CPU checkpoint: on the card as on the CPU") as found:
        _compare(found, _losses(here), _losses(cpu)[:last], count=last, tolerance=DEVICE_TOLERANCE)
    with bench.check("CPU checkpoint: and back on the CPU") as found:
        train(here, last + 1, hide_card=True)
        _compare(found, _losses(here), _losses(cpu), count=last + 1, tolerance=DEVICE_TOLERANCE)


def _without_engine(bench: Bench, commands: Commands) -> None:
    size = sizes(bench.cuda)
    with bench.check(f"{commands.name}: {size.halfway} steps") as found:
        bench.require_transformer_engine()
        common = _common(bench, size, f"train.exit_step={size.halfway}")
        commands.train("nano_dense.yaml", bench.work / ENGINELESS, *common, hide_engine=True)
        losses = _losses(bench.work / ENGINELESS)
        found.figure = f"loss {losses[0]:.3f} to {losses[-1]:.3f}"


def _common(bench: Bench, size: Sizes, *overrides: str) -> tuple[str, ...]:
    schedule = (f"train.train_steps={size.last}", "schedule.lr_warmup_steps=2")
    return (f"data.prefix={read_packed(bench.folder).prefix}", *schedule, *size.nano, *overrides)


def _losses(run_dir: Path) -> list[float]:
    records = [json.loads(line) for line in (run_dir / METRICS_FILE).read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1)), "a step is missing"
    losses = [record["loss"] for record in records]
    assert all(map(math.isfinite, losses)), losses
    return losses


def _require_statistics(run_dir: Path, steps: int) -> None:
    """A line each step, every layer with the same finite fields."""
    records = [json.loads(line) for line in (run_dir / STATISTICS_FILE).read_text().splitlines()]
    assert len(records) == steps, f"{len(records)} lines of statistics"
    fields = set(records[-1]["layers"][0])
    assert fields >= {"out_var", "cos", "grad_norm"}, sorted(fields)
    for record in records:
        for layer in record["layers"]:
            values = [value for value in layer.values() if isinstance(value, float)]
            assert all(map(math.isfinite, values)), f"step {record['step']}, layer {layer['layer']}: {layer}"


def _compare(found: Finding, losses: list[float], expected: list[float], *, count: int, tolerance: float) -> None:
    assert len(losses) == len(expected) == count, f"{len(losses)} and {len(expected)} of {count} steps"
    differences = [abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True)]
    found.values = {"largest_relative_difference": max(differences)}
    first = next((step for step, difference in enumerate(differences, start=1) if difference), None)
    found.figure = (
        "the same bit by bit"
        if first is None
        else f"differ from step {first} on, by {max(differences):.1e} at most (allowed {tolerance:g})"
    )
    assert max(differences) < tolerance, found.figure


def _shown(losses: list[float]) -> str:
    return ", ".join(f"{loss:.4f}" for loss in losses)
