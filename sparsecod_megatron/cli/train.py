"""`sparsecod train`: one rank under torchrun, or the launcher of N ranks on this machine."""

from __future__ import annotations

import argparse
import logging
import os

from sparsecod_megatron.cli.launch import is_first, is_rank, launch, run_rank
from sparsecod_megatron.cli.options import check_at_least

HELP = "Pretrain a model. Under torchrun or Slurm this process is one rank; --nproc N starts N ranks on this machine."
EXAMPLE = "sparsecod train examples/configs/nano_dense.yaml data.prefix=data/stdlib train.train_steps=200 --nproc 2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `sparsecod train`."""
    parser.add_argument("config", help="YAML file (examples/configs)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="values that replace the file's")
    parser.add_argument("--nproc", type=int, default=1, help="processes to start on this machine (default 1)")
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="R",
        help="with --nproc: start all processes again up to R times after one fails; they resume from the last "
        "checkpoint (default 0)",
    )


def run(args: argparse.Namespace) -> None:
    """Check the run, then train or launch.

    Raises:
        SparsecodError: a run that is impossible, or an invalid number of processes or restarts.
    """
    from sparsecod_megatron.config import data_parallel_size, load_config
    from sparsecod_megatron.mechanisms import MECHANISMS

    check_at_least(args, nproc=1, max_restarts=0)
    config = load_config(args.config, args.overrides, mechanisms=MECHANISMS)
    data_parallel_size(config, world_size=int(os.environ["WORLD_SIZE"]) if is_rank() else args.nproc)
    if args.nproc > 1 and not is_rank():
        launch(args.command_line, nproc=args.nproc, max_restarts=args.max_restarts)
        return
    from sparsecod_megatron.backend import select_backend

    _show_log()

    def train() -> None:
        backend = select_backend(config.backend, precision=config.precision, cpu_kernels=config.cpu_kernels)
        from sparsecod_megatron.cli.task_evaluation import task_evaluator
        from sparsecod_megatron.train import run_training

        asked = config.evaluation.interval > 0 and is_first()
        run_training(config, backend, task_evaluator(config.evaluation, backend.device.type) if asked else None)

    run_rank(train)


def _show_log() -> None:
    logger = logging.getLogger("sparsecod")
    logger.setLevel(logging.INFO if is_first() else logging.ERROR)
    logger.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
