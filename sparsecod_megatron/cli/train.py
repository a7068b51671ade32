"""`sparsecod train`: one rank under torchrun, or the launcher of N ranks on this machine."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys

import psutil

from sparsecod_megatron.cli.launch import report_to_launcher
from sparsecod_megatron.errors import SparsecodError

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
    """Check the run, then train or launch."""
    from sparsecod_megatron.config import data_parallel_size, load_config

    config = load_config(args.config, args.overrides)
    is_rank = "RANK" in os.environ
    data_parallel_size(config, world_size=int(os.environ["WORLD_SIZE"]) if is_rank else args.nproc)
    if args.nproc > 1 and not is_rank:
        from sparsecod_megatron.cli.launch import launch

        launch(["train", args.config, *args.overrides], nproc=args.nproc, max_restarts=args.max_restarts)
        return
    from sparsecod_megatron.backend import select_backend

    _show_log(is_first=os.environ.get("RANK", "0") == "0")
    backend = select_backend(config.backend, precision=config.precision)
    from sparsecod_megatron.train import run_training

    if not is_rank:
        run_training(config, backend)
        return
    try:
        run_training(config, backend)
    except BaseException as error:
        if isinstance(error, SystemExit) or not report_to_launcher(error):
            raise
        # At once: the end of an ordinary exit may wait for peers that wait for this rank.
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, SparsecodError) else 1)


def _show_log(*, is_first: bool) -> None:
    logger = logging.getLogger("sparsecod")
    logger.setLevel(logging.INFO if is_first else logging.ERROR)
    logger.propagate = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
