"""The options of `sparsecod analyze` that say which task a model is asked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.cli.options import names
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.analysis.tasks.request import TaskRequest
    from sparsecod_megatron.config import DataConfig


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Declare --task and --difficulties."""
    parser.add_argument(
        "--task",
        metavar="T",
        help="for scores that ask for answers: `addition` (by digits), `hops` (steps in a list of facts), `synthetic` "
        "(the held-out samples of a run's data.synthetic), or a file of JSON lines with prompt, answer and difficulty",
    )
    parser.add_argument(
        "--difficulties", metavar="A,B", help="digits of addition (default 1,2,3,4) or steps of hops (default 1,2,3)"
    )


def requested_task(args: argparse.Namespace) -> TaskRequest | None:
    """The task that the command asks; None without one.

    Raises:
        ConfigError: a task that no score asks, a score without its task, or difficulties that cannot be.
    """
    from sparsecod_megatron.analysis.tasks.request import TaskRequest, check_task

    texts = () if args.difficulties is None else names(args.difficulties)
    if args.difficulties is not None and not (texts and all(text.isdecimal() for text in texts)):
        raise ConfigError(f"--difficulties {args.difficulties}: give whole numbers, such as 1,2,4")
    difficulties = tuple(map(int, texts))
    check_task(names(args.scores), args.task, difficulties)
    return None if args.task is None else TaskRequest(args.task, args.samples, args.seed, difficulties)


def data_of(path: Path) -> DataConfig | None:
    """The data section of the run that a model is, or is a step of; None for other models."""
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir
    from sparsecod_megatron.checkpoint.state import saved_config
    from sparsecod_megatron.files import MODEL_CONFIG_FILE

    return None if (path / MODEL_CONFIG_FILE).is_file() else saved_config(resolve_step_dir(path)).data
