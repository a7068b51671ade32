"""`sparsecod doctor`: whether a run's checkpoint is what the run trained, and a new run where it is not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.cli.launch import RanksFailed, add_answer_argument, answer, is_rank, launch_for_answer, run_rank
from sparsecod_megatron.errors import ConfigError, SparsecodError

if TYPE_CHECKING:
    from sparsecod_megatron.checkpoint.examination import Finding

HELP = (
    "Examine a run's checkpoint: its files, fp32 weights and moments against the model, data and versions against "
    "those of the run, and two of its steps once more. Exit status 1 if something differs. Writes nothing into the run."
)
EXAMPLE = "sparsecod doctor runs/nano_dense"
PACKAGES = ("python", "cuda", "nccl", "torch", "numpy", "megatron-core", "transformer-engine", "sparsecod-megatron")
"""Versions that the numbers of a step depend on."""
MARKS = {True: "ok", False: "DIFFERS", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod doctor`."""
    parser.add_argument("run", type=Path, help="run directory (its latest checkpoint) or one of its step directories")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="a.b=c",
        help="values that have changed, e.g. data.prefix of moved files",
    )
    parser.add_argument(
        "--nproc",
        type=int,
        help="processes to start (default: as many as the run had, if this machine has as many cores or GPUs; else 1)",
    )
    parser.add_argument("--no-rehearsal", action="store_true", help="only look at files")
    parser.add_argument(
        "--repair",
        type=Path,
        metavar="NEW_RUN",
        help="write instead a run that continues from the model's weights with fresh fp32 weights and moments",
    )
    add_answer_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Examine and print the table, or repair.

    Raises:
        SparsecodError: no checkpoint there, or arguments that cannot be used.
        RanksFailed: something differs.
    """
    if args.found is not None:
        run_rank(lambda: _be_rank(args))
        return
    if is_rank():
        raise ConfigError("doctor starts its own processes; run it without torchrun")
    from sparsecod_megatron.backend import select_backend

    select_backend()
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir

    step_dir = resolve_step_dir(args.run)
    if args.repair is not None:
        _repaired(args, step_dir)
        return
    findings = [*_examined(step_dir, args.overrides), *([] if args.no_rehearsal else [_rehearsed(args, step_dir)])]
    width = max(len(finding.subject) for finding in findings)
    print(step_dir)
    for finding in findings:
        print(f"  {finding.subject:{width}}  {MARKS[finding.as_it_should_be]:7}  {finding.text}")
    if wrong := [finding for finding in findings if finding.as_it_should_be is False]:
        raise RanksFailed(f"{len(wrong)} of {len(findings)} differ, the first: {wrong[0].subject}: {wrong[0].text}")


def _examined(step_dir: Path, overrides: list[str]) -> Iterator[Finding]:
    """What the files show, each finding by itself: one that fails does not hide the others."""
    from sparsecod_megatron.checkpoint.examination import Finding, examine_files, examine_moments, examine_weights
    from sparsecod_megatron.checkpoint.paths import run_of

    for subject, examine in (
        ("files", lambda: examine_files(step_dir)),
        ("fp32 weights", lambda: examine_weights(step_dir)),
        ("moments", lambda: examine_moments(step_dir)),
        ("data", lambda: _data(step_dir, overrides)),
        ("versions", lambda: _versions(run_of(step_dir))),
    ):
        try:
            yield examine()
        except SparsecodError as error:
            yield Finding(subject, False, " ".join(str(error).split()))


def _data(step_dir: Path, overrides: list[str]) -> Finding:
    from sparsecod_megatron.checkpoint.examination import Finding
    from sparsecod_megatron.checkpoint.state import read_state
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.config.blend import parse_blend
    from sparsecod_megatron.config.run_files import CONFIG_FILE
    from sparsecod_megatron.data.fingerprint import check_fingerprint, fingerprint_of
    from sparsecod_megatron.mechanisms import SAVED_MECHANISMS

    saved = read_state(step_dir).train.data
    if not saved:
        return Finding("data", None, "the checkpoint keeps none")
    config = load_config(step_dir / CONFIG_FILE, overrides, mechanisms=SAVED_MECHANISMS)
    check_fingerprint(saved, fingerprint_of(config.data, seed=config.train.seed), allow_changed=False)
    if config.data.synthetic:
        return Finding("data", True, f"data.synthetic.task={config.data.synthetic['task']} as it was")
    return Finding("data", True, f"{', '.join(parse_blend('data.train', config.data.train).prefixes)} as it was")


def _versions(run_dir: Path) -> Finding:
    from sparsecod_megatron.checkpoint.examination import Finding
    from sparsecod_megatron.config.run_files import VERSIONS_FILE
    from sparsecod_megatron.config.versions import installed_versions, recorded_versions

    recorded = recorded_versions(run_dir)
    if recorded is None:
        return Finding("versions", None, f"no {VERSIONS_FILE}")
    then, now = ({**entry, **entry["packages"]} for entry in (recorded, installed_versions()))
    for name in PACKAGES:
        if then.get(name) != now.get(name):
            return Finding("versions", False, f"{name} was {then.get(name)} and is {now.get(name)}")
    return Finding("versions", True, ", ".join(f"{name} {now[name]}" for name in PACKAGES if now.get(name)))


def _rehearsed(args: argparse.Namespace, step_dir: Path) -> Finding:
    from sparsecod_megatron.checkpoint.examination import Finding
    from sparsecod_megatron.checkpoint.paths import run_of
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.mechanisms import SAVED_MECHANISMS
    from sparsecod_megatron.train.rehearsal import STEPS, first_deviation, recorded_steps, same_layout

    recorded = recorded_steps(run_of(step_dir), until=step_dir)
    if recorded is None:
        return Finding("rehearsal", None, f"no checkpoint with {STEPS} recorded steps behind it")
    config = load_config(recorded.config, args.overrides, mechanisms=SAVED_MECHANISMS)
    nproc = args.nproc or _available(recorded.layout["world_size"])
    try:
        again = launch_for_answer(args, nproc=nproc)
    except SparsecodError as error:
        return Finding("rehearsal", False, " ".join(str(error).split()))
    bitwise = same_layout(recorded, config.parallel, nproc)
    where = f"from {recorded.step_dir.name}, {nproc} processes, {'the same' if bitwise else 'another'} layout"
    if deviation := first_deviation(recorded, again, bitwise=bitwise, dtype=config.precision.dtype):
        return Finding("rehearsal", False, f"{deviation[0]}, {deviation[1]:.1e} apart ({where})")
    losses = ", ".join(f"{result['loss']:.5f}" for result in again)
    return Finding(
        "rehearsal", True, f"losses {losses} {'bit for bit' if bitwise else 'closely'} as recorded ({where})"
    )


def _available(wanted: int) -> int:
    """`wanted` processes if this machine has a core or a GPU for each, otherwise one."""
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else os.cpu_count() or 1
    return wanted if wanted <= there else 1


def _repaired(args: argparse.Namespace, step_dir: Path) -> None:
    launch_for_answer(args, nproc=args.nproc or 1)
    print(f"{args.repair}  from {step_dir}; continue with: sparsecod train {args.repair / 'config.yaml'}")


def _be_rank(args: argparse.Namespace) -> None:
    """One process of the rehearsal, or of the repair."""
    from sparsecod_megatron.backend import select_backend
    from sparsecod_megatron.config import ParallelConfig, load_config
    from sparsecod_megatron.config.run_files import CONFIG_FILE
    from sparsecod_megatron.mechanisms import SAVED_MECHANISMS

    select_backend()
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir, run_of
    from sparsecod_megatron.train.rehearsal import recorded_steps, rehearse
    from sparsecod_megatron.train.repair import repair

    step_dir = resolve_step_dir(args.run)
    recorded = None if args.repair else recorded_steps(run_of(step_dir), until=step_dir)
    saved = recorded.config if recorded else step_dir / CONFIG_FILE
    config = load_config(saved, args.overrides, mechanisms=SAVED_MECHANISMS)
    backend = select_backend(config.backend, precision=config.precision, cpu_kernels=config.cpu_kernels)
    if recorded is None:
        one = replace(config, parallel=ParallelConfig()) if args.nproc == 1 else config
        repair(run_of(step_dir), step_dir, args.repair, one, backend)
        answer(args, None)
        return
    answer(args, rehearse(recorded, config, backend, nproc=args.nproc))
