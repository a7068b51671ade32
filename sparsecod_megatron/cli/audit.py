"""`sparsecod audit`: whether a configuration trains the same model under every layout, shown on a small one."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.cli.launch import RanksFailed, add_answer_argument, answer, is_rank, launch_for_answer, run_rank
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.audit.rows import Plan
    from sparsecod_megatron.audit.small import Small

HELP = (
    "Step the configuration's architecture, made small, under every layout of up to four processes, and compare "
    "losses, gradients, statistics and weights with one process. Exit status 1 if a row differs."
)
EXAMPLE = "sparsecod audit examples/configs/moe_1B_7B.yaml --only 'ep2*' --output audits/moe"
SIZES = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod audit`."""
    parser.add_argument("config", help="YAML file (examples/configs)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument(
        "--nproc", type=int, help="processes to start, 1, 2 or 4 (default: 4, or as many as there are GPUs)"
    )
    parser.add_argument(
        "--only", action="append", metavar="ROW", help="rows of this name and what they need; * stands for any text"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write DIR/audit.json; replaced")
    add_answer_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Start the processes, print the table.

    Raises:
        SparsecodError: a configuration, a number of processes or a pattern that cannot be used; nothing is written.
        RanksFailed: a row is red.
    """
    from sparsecod_megatron.audit.rows import plan_rows
    from sparsecod_megatron.audit.small import small_run
    from sparsecod_megatron.config import load_config
    from sparsecod_megatron.files import check_writable
    from sparsecod_megatron.mechanisms import MECHANISMS

    if is_rank() and args.found is None:
        raise ConfigError("audit starts its own processes; run it without torchrun")
    if args.output is not None:
        check_writable(args.output)
    nproc, capability = _processes(args.nproc)
    small = small_run(load_config(args.config, args.overrides, mechanisms=MECHANISMS), capability=capability)
    plan = plan_rows(small.config, nproc=nproc, only=args.only)
    if args.found is not None:
        run_rank(lambda: _be_rank(args, plan, small))
        return
    from sparsecod_megatron.audit.report import audit_json, audit_text, write_audit

    began = time.monotonic()
    verdicts = launch_for_answer(args, nproc=nproc)
    content = audit_json(verdicts, config=str(args.config), notes=small.notes, left_out=plan.left_out)
    if args.output is not None:
        write_audit(content, args.output)
    print(audit_text(content))
    print(f"\n{len(verdicts)} rows in {time.monotonic() - began:.0f} s, {len(content['red']) or 'none'} red")
    if content["red"]:
        raise RanksFailed(f"{len(content['red'])} of {len(verdicts)} rows red, the first: {content['red'][0]}")


def _processes(asked: int | None) -> tuple[int, tuple[int, int] | None]:
    """(number to start, compute capability of the GPUs, which they do not share; None is the CPU)."""
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    capability = None if gpus is None else torch.cuda.get_device_capability()
    if asked is None:
        return max(size for size in SIZES if gpus is None or size <= gpus), capability
    if asked not in SIZES:
        raise ConfigError(f"--nproc {asked}: layouts use 1, 2 or 4 processes; give one of these")
    if gpus is not None and asked > gpus:
        raise ConfigError(f"--nproc {asked}: this machine has {gpus} GPUs, and processes cannot share one; give fewer")
    return asked, capability


def _be_rank(args: argparse.Namespace, plan: Plan, small: Small) -> None:
    from sparsecod_megatron.backend import select_backend

    config = small.config
    backend = select_backend(config.backend, precision=config.precision, cpu_kernels=config.cpu_kernels)
    from sparsecod_megatron.audit.ranks import audit_rows, started_processes

    # Checkpoints of rows lie beside the answer: the same folder for all processes, which goes with it.
    verdicts = audit_rows(started_processes(), plan.rows, config, backend, args.found.parent)
    answer(args, [verdict.json() for verdict in verdicts])
