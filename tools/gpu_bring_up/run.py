"""All steps in their order, within the time that there is, and what is kept of them."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tools.gpu_bring_up.bench import FAIL, PASS, SKIP, Bench, Check
from tools.gpu_bring_up.environment import CARD, ENGINE_SITE, IMPORTS_ENGINE, SITE
from tools.gpu_bring_up.process import ROOT, forked, fresh
from tools.gpu_bring_up.results import closing_table, write_results
from tools.gpu_bring_up.steps import ENVIRONMENT, KERNELS, KERNELS_NEEDED, LIMIT_S, STEPS, Step

LOG_FILE, LOG_BYTES = "log.txt", 1_500_000
"""Kept of each step's output: its end. Eight steps stay below the 16 MiB that a file may have."""
MIN_SECONDS = 5.0
"""A step that would have less is not started."""
MODULES_PRELOADED = ("pytest", "sparsecod_megatron.cli.main", "tests.helpers.imported")


def bring_up(folder: Path, output: Path, *, only: Sequence[str] = (), limit_s: float = LIMIT_S) -> bool:
    """Run the steps; print the table last.

    Args:
        folder: what was packed.
        output: of results, log and profile; made if absent.
        only: names of the steps to run; all if empty. The environment always is one of them.
        limit_s: of all together; time-outs of steps are in proportion.

    Returns:
        Whether nothing failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / LOG_FILE).unlink(missing_ok=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu_bring_up_") as scratch:
        bench = Bench(folder.resolve(), Path(scratch), output.resolve(), pace=limit_s / LIMIT_S)
        checks: list[Check] = []
        for name in (SITE, ENGINE_SITE):
            (bench.work / name).mkdir()  # before a process has them on its path
        chosen = [step for step in STEPS if not only or step.name in only or step.name == ENVIRONMENT]
        allowance = 0.0
        for step in chosen:
            left = limit_s - (time.monotonic() - began)
            allowance = min(allowance + step.seconds * bench.pace, left)
            started = time.monotonic()
            checks += _run_step(step, bench, allowance)
            allowance -= time.monotonic() - started
            write_results(output, checks, seconds=time.monotonic() - began)
            bench = _adapted(bench, step, checks)
    print(f"\n{closing_table(checks)}", flush=True)
    return not any(check.state == FAIL for check in checks)


def _run_step(step: Step, bench: Bench, timeout_s: float) -> list[Check]:
    """What it found, and a line of its own if its process did not end well."""
    bench = bench.of(step.name)
    if timeout_s < MIN_SECONDS:
        return [Check(step.name, step.proves, SKIP, "no time was left")]
    print(f"\n== {step.name} (at most {timeout_s:.0f} s): {step.proves}", flush=True)
    began, log = time.monotonic(), bench.work / f"{step.name}.log"
    if step.name != ENVIRONMENT and not bench.cuda and _preloaded(bench):
        status = forked(step.run, bench, environment=_environment(bench), log=log, timeout_s=timeout_s, own_group=True)
    else:
        arguments = ["-m", "tools.gpu_bring_up.step", bench.to_json()]
        status = fresh(arguments, environment=_environment(bench), log=log, timeout_s=timeout_s, own_group=True)
    seconds, checks = time.monotonic() - began, bench.checks()
    printed = log.read_bytes() if log.exists() else b""
    with (bench.output / LOG_FILE).open("ab") as kept:
        kept.write(f"\n== {step.name}, {seconds:.1f} s, status {status}\n".encode() + printed[-LOG_BYTES:])
    for check in checks:
        print(f"{check.state}  {check.name}: {check.figure}", flush=True)
    if status != 0:
        last = printed.decode(errors="replace").strip().splitlines()[-1:] or ["it printed nothing"]
        reason = f"killed after {timeout_s:.0f} s" if status is None else f"ended with status {status}: {last[0][:300]}"
        checks.append(Check(step.name, "its process", FAIL, reason, round(seconds, 2)))
        print(f"{FAIL}  {reason}", flush=True)
    return checks


def _adapted(bench: Bench, step: Step, checks: Sequence[Check]) -> Bench:
    """What the first two steps found decides how the others run."""
    states = {check.name: check.state for check in checks if check.step == step.name}
    if step.name == ENVIRONMENT:
        cuda = states[CARD] == PASS if CARD in states else shutil.which("nvidia-smi") is not None
        return replace(bench, cuda=cuda, transformer_engine=states.get(IMPORTS_ENGINE) == PASS)
    if step.name == KERNELS and bench.transformer_engine:
        return replace(bench, transformer_engine=all(states.get(name) == PASS for name in KERNELS_NEEDED))
    return bench


def _environment(bench: Bench) -> Mapping[str, str]:
    """Environment of a step: its path, caches in the scratch folder, and what training on GPUs sets."""
    path = [str(bench.work / SITE), str(ROOT)]
    if bench.step in (ENVIRONMENT, KERNELS) or bench.transformer_engine:
        path.insert(0, str(bench.work / ENGINE_SITE))
    path += filter(None, [os.environ.get("PYTHONPATH")])
    caches = {
        name: str(bench.work / "caches" / name.lower())
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "HF_HOME", "MPLCONFIGDIR")
    }
    return {
        **os.environ,
        **caches,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONUNBUFFERED": "1",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(bench.work),
        "WANDB_MODE": "disabled",
    }


def _preloaded(bench: Bench) -> bool:
    """Import, once, what forks of this process need; where that fails, steps find out by themselves."""
    site = str(bench.work / SITE)
    if site not in sys.path:
        sys.path.insert(0, site)
    try:
        for name in MODULES_PRELOADED:
            importlib.import_module(name)
    except Exception as error:  # whatever a broken package raises
        print(f"nothing is imported ahead: {type(error).__name__}: {error}", flush=True)
        return False
    return True
