"""`sparsecod eval`: perplexity and lm-eval tasks of one model, or of several side by side."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecod_megatron.cli.launch import share_work
from sparsecod_megatron.cli.options import add_model_options, check_at_least, names
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsecod_megatron.evaluation.harness import LoadedTasks
    from sparsecod_megatron.evaluation.perplexity import ScoredWindows
    from sparsecod_megatron.evaluation.result import ModelResult
    from sparsecod_megatron.models.opening import Opened
    from sparsecod_megatron.parallel.processes import Processes

HELP = "Score models: lm-eval tasks, perplexity on held-out text, or both; several models are compared in one table."
EXAMPLE = "sparsecod eval --model runs/dense runs/moe --perplexity data/x_val --tasks arc_easy,piqa --output compared"
MAX_DEFAULT_TOKENS = 2048
CONTINUATION_TASK = "true_continuation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="HuggingFace directories, training runs or step directories; the latter two are exported temporarily",
    )
    what = parser.add_argument_group("what to run (default: --tasks paper)")
    what.add_argument(
        "--perplexity", type=Path, metavar="PREFIX_OR_TEXT", help="held-out dataset prefix or UTF-8 text file"
    )
    what.add_argument("--tasks", metavar="A,B", help="lm-eval tasks or groups; `paper` stands for the paper's")
    what.add_argument(
        "--continuation-task",
        type=Path,
        metavar="PREFIX_OR_TEXT",
        help="make a task from this held-out text in OUTPUT/tasks (the true continuation among four) and run it",
    )
    parser.add_argument(
        "--questions", type=int, default=100, metavar="N", help="questions of --continuation-task (default 100)"
    )
    parser.add_argument("--include-path", type=Path, metavar="DIR", help="folder with more lm-eval task YAML files")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="trial run: the first N questions of each task, N windows of text"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows per forward pass (default 8)")
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes that share the work, with the same result (default 1)",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help=f"tokens of a perplexity window (default: the model's longest, at most {MAX_DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: --seq-length, no overlap)"
    )
    add_model_options(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="seed of bootstrap, few-shot and continuation task (default 0)"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="results.json and results.md (default, of one model: DIR/eval)"
    )


def run(args: argparse.Namespace) -> None:
    """Evaluate, write both result files and print the table.

    Raises:
        SparsecodError: arguments, model or data that cannot be used.
    """
    tasks = _tasks(args)
    _check(args, tasks)
    share_work(args, lambda processes: _evaluate(args, tasks, processes))


def _tasks(args: argparse.Namespace) -> list[str]:
    """Names of the tasks to run; the paper's, where nothing else was asked for."""
    tasks = names(args.tasks)
    if args.tasks is not None and not tasks:
        raise ConfigError(f"--tasks {args.tasks!r}: names no task; give at least one, or leave it out for the paper's")
    if not (tasks or args.perplexity or args.continuation_task):
        from sparsecod_megatron.evaluation.paper_tasks import PAPER

        return [PAPER]
    return tasks


def _check(args: argparse.Namespace, tasks: list[str]) -> None:
    check_at_least(args, limit=1, batch_size=1, seq_length=1, stride=1, questions=1, seed=0)
    if args.include_path and not tasks:
        raise ConfigError(f"--include-path {args.include_path}: has no effect without --tasks; name the tasks to run")
    for index, model in enumerate(args.model):
        if model in args.model[:index]:
            raise ConfigError(f"--model {model}: given twice; name each model once")
    if len(args.model) > 1 and args.output is None:
        raise ConfigError(f"--output: not given, and {len(args.model)} models have no folder in common; give one")


def _evaluate(args: argparse.Namespace, tasks: list[str], processes: Processes) -> None:
    from sparsecod_megatron.evaluation.corpus import dataset_prefix
    from sparsecod_megatron.evaluation.report import write_report
    from sparsecod_megatron.files import check_writable
    from sparsecod_megatron.models.opening import open_model

    output = args.output or args.model[0] / "eval"
    check_writable(output)
    if args.perplexity:
        dataset_prefix(args.perplexity)  # a wrong path should not wait for the model
    options = {"dtype": args.dtype, "device": args.device, "verify": not args.no_verify, "processes": processes}
    results = []
    with contextlib.ExitStack() as stack:
        models = [stack.enter_context(open_model(path, **options)) for path in args.model]
        loaded = _load_tasks(args, tasks, models[0].tokenizer, output, processes)
        for path, opened in zip(args.model, models, strict=True):
            results.append(_measure(args, str(path), opened, loaded, processes))
            opened.close()
    if processes.is_first:
        print(write_report(output, _settings(args, tasks, output), results), end="")
        print(f"wrote {output / 'results.json'} and {output / 'results.md'}")


def _settings(args: argparse.Namespace, tasks: list[str], output: Path) -> dict[str, Any]:
    """What was run, without settings that do not affect the numbers."""
    from sparsecod_megatron.models.loading import usable_device

    given = {name: value for name, value in vars(args).items() if name not in ("nproc", "command_line")}
    model = str(args.model[0]) if len(args.model) == 1 else list(map(str, args.model))
    ran = [*tasks, CONTINUATION_TASK] if args.continuation_task else tasks
    return given | {"model": model, "tasks": ran, "device": usable_device(args.device), "output": output}


def _load_tasks(
    args: argparse.Namespace, tasks: list[str], tokenizer: PreTrainedTokenizerBase, output: Path, processes: Processes
) -> LoadedTasks | None:
    """The named tasks, and the one made of --continuation-task, with their data."""
    from sparsecod_megatron.evaluation.continuation_task import write_continuation_task
    from sparsecod_megatron.evaluation.corpus import read_documents
    from sparsecod_megatron.evaluation.harness import load_tasks

    include_paths, builtin = [args.include_path] if args.include_path else [], bool(tasks)
    if args.continuation_task:
        made = processes.from_first(
            lambda: write_continuation_task(
                read_documents(args.continuation_task, tokenizer),
                output / "tasks",
                name=CONTINUATION_TASK,
                num_questions=args.questions,
                seed=args.seed,
            )
        )
        include_paths.append(made)
        tasks = [*tasks, CONTINUATION_TASK]
    return load_tasks(tasks, include_paths=include_paths, builtin=builtin) if tasks else None


def _measure(
    args: argparse.Namespace,
    name: str,
    opened: Opened,
    loaded: LoadedTasks | None,
    processes: Processes,
) -> ModelResult:
    """Everything that was asked for, for one model."""
    from sparsecod_megatron.evaluation.harness import run_tasks
    from sparsecod_megatron.evaluation.perplexity import summary
    from sparsecod_megatron.evaluation.result import ModelResult

    model, tokenizer = opened.model, opened.tokenizer
    perplexity = windows = scores = None
    if args.perplexity:
        windows, num_bytes = _score_text(args, model, tokenizer, processes)
        perplexity = summary(windows, seed=args.seed, num_bytes=num_bytes)
    if loaded is not None:
        progress = processes.is_first and sys.stderr.isatty()
        options = {"limit": args.limit, "batch_size": args.batch_size, "seed": args.seed}
        scores = run_tasks(model, tokenizer, loaded, processes=processes, progress=progress, **options)
    return ModelResult(name, perplexity, windows, scores)


def _score_text(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, processes: Processes
) -> tuple[ScoredWindows, int]:
    """Losses of the held-out text's windows, and its bytes."""
    from sparsecod_megatron.evaluation.corpus import read_corpus
    from sparsecod_megatron.evaluation.perplexity import score_windows

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MAX_DEFAULT_TOKENS
    seq_length = args.seq_length or min(longest, MAX_DEFAULT_TOKENS)
    if seq_length > longest:
        raise ConfigError(
            f"--seq-length {seq_length}: the model takes at most {longest} tokens (max_position_embeddings)"
        )
    stride = args.stride or seq_length
    max_tokens = None if args.limit is None else seq_length + (args.limit - 1) * stride
    corpus = read_corpus(args.perplexity, tokenizer, max_tokens=max_tokens)
    windows = score_windows(
        model, corpus.tokens, seq_length=seq_length, stride=stride, batch_size=args.batch_size, processes=processes
    )
    return windows, corpus.num_bytes
