"""The task that `sparsecod analyze` asks a model: a file of questions, one made here, or the run's own."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.cli.options import names
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sparsecod_megatron.analysis.tasks.items import Items


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


def check_task(args: argparse.Namespace) -> None:
    """Refuse a task that no score asks, scores without their task, and difficulties of a task that has its own.

    Raises:
        ConfigError: any of these.
    """
    from sparsecod_megatron.analysis.scores.registry import ASKING, TAKING_TASKS
    from sparsecod_megatron.analysis.tasks.built_in import BUILT_IN

    scores = names(args.scores)
    asking = [score for score in scores if score in ASKING]
    if args.task is not None and not set(scores) & set(TAKING_TASKS):
        raise ConfigError(
            f"--task {args.task}: no score asks it; leave it out, or add {' or '.join(TAKING_TASKS)} to --scores"
        )
    if args.task is None and asking:
        from sparsecod_megatron.analysis.tasks.items import without_task

        raise without_task(asking[0])
    if args.difficulties is None:
        return
    if args.task not in BUILT_IN:
        raise ConfigError(f"--difficulties {args.difficulties}: only of --task {' and '.join(BUILT_IN)}; leave it out")
    if not all(name.isdecimal() for name in names(args.difficulties)) or not names(args.difficulties):
        raise ConfigError(f"--difficulties {args.difficulties}: give whole numbers, such as 1,2,4")


def needs_text(scores: Sequence[str]) -> bool:
    """Whether any of the scores is measured on text."""
    from sparsecod_megatron.analysis.scores.registry import ASKING

    return not scores or any(score not in ASKING for score in scores)


def read_task(
    args: argparse.Namespace, path: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> Items | None:
    """The task's items in the model's tokens, at most `--samples`; None without a task.

    Args:
        args: the command's.
        path: the model as it was given.
        tokenizer: the model's.
        vocab_size: the model's.

    Raises:
        ConfigError: `synthetic` of a model that is not a run on `data.synthetic`.
        DataError: a file without questions, or tokens that the model lacks.
    """
    from sparsecod_megatron.analysis.tasks.built_in import BUILT_IN, make_pairs
    from sparsecod_megatron.analysis.tasks.items import items_of
    from sparsecod_megatron.analysis.tasks.synthetic import SYNTHETIC
    from sparsecod_megatron.analysis.tasks.text import drawn, read_pairs, tokenised
    from sparsecod_megatron.evaluation.corpus import leading_token

    if args.task is None:
        return None
    if args.task == SYNTHETIC:
        return _synthetic(path, args.samples, args.seed)
    if args.task in BUILT_IN:
        wanted = None if args.difficulties is None else [*map(int, names(args.difficulties))]
        pairs = make_pairs(args.task, wanted, count=args.samples, seed=args.seed)
    else:
        pairs = drawn(read_pairs(Path(args.task)), args.samples, seed=args.seed)
    answered = tokenised(pairs, tokenizer, leading=leading_token(tokenizer), name=args.task)
    return items_of(args.task, answered, vocab_size=vocab_size)


def _synthetic(path: Path, count: int, seed: int) -> Items:
    from sparsecod_megatron.analysis.tasks.synthetic import SYNTHETIC, synthetic_items
    from sparsecod_megatron.checkpoint.paths import resolve_step_dir
    from sparsecod_megatron.checkpoint.state import saved_config
    from sparsecod_megatron.data.synthetic.registry import task_of
    from sparsecod_megatron.files import MODEL_CONFIG_FILE

    task = None
    if not (path / MODEL_CONFIG_FILE).is_file():
        data = saved_config(resolve_step_dir(path)).data
        task = task_of(data)
    if task is None:
        raise ConfigError(
            f"--task {SYNTHETIC}: {path} is not a run on data.synthetic; give such a run or step, or another task"
        )
    return synthetic_items(task, seq_length=data.seq_length, count=count, seed=seed)
