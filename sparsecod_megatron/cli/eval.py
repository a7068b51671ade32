"""`sparsecod eval`: perplexity and lm-eval tasks of a HuggingFace model directory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.cli.hf_model import add_model_options, device, names
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sparsecod_megatron.evaluation.perplexity import PerplexityResult

HELP = "Score a HuggingFace model directory: perplexity on held-out text, lm-eval tasks, or both."
EXAMPLE = (
    "sparsecod eval --model runs/dense/hf --perplexity data/x_val --continuation-task data/x_val --tasks arc_easy,piqa"
)
LONGEST_DEFAULT_TOKENS = 2048
CONTINUATION_TASK = "true_continuation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="model and tokenizer, as `sparsecod export` writes"
    )
    what = parser.add_argument_group("what to run, at least one")
    what.add_argument(
        "--perplexity", type=Path, metavar="PREFIX_OR_TEXT", help="held-out dataset prefix or UTF-8 text file"
    )
    what.add_argument("--tasks", metavar="A,B", help="lm-eval tasks or groups, comma-separated")
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
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="rows of a forward pass (default 8)")
    parser.add_argument(
        "--seq-length",
        type=int,
        metavar="N",
        help=f"tokens of a perplexity window (default: the model's longest, at most {LONGEST_DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--stride", type=int, metavar="N", help="tokens between windows (default: --seq-length, no overlap)"
    )
    add_model_options(parser)
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of bootstrap, few-shot and continuation task (default 0)"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="results.json and results.md (default: MODEL/eval)")


def run(args: argparse.Namespace) -> None:
    """Evaluate, write both result files and print the table.

    Raises:
        SparsecodError: arguments, model or data that cannot be used.
    """
    tasks = names(args.tasks)
    _check(args, tasks)

    from sparsecod_megatron.evaluation.continuation_task import write_continuation_task
    from sparsecod_megatron.evaluation.corpus import dataset_prefix, read_documents
    from sparsecod_megatron.evaluation.files import check_writable
    from sparsecod_megatron.evaluation.harness import load_tasks, run_tasks
    from sparsecod_megatron.evaluation.model import check_model_directory, load_model, load_tokenizer
    from sparsecod_megatron.evaluation.report import write_report

    check_model_directory(args.model)
    output = args.output or args.model / "eval"
    check_writable(output)
    if args.perplexity:
        dataset_prefix(args.perplexity)  # a wrong path should not wait for the model
    tokenizer = load_tokenizer(args.model)
    include_paths = [args.include_path] if args.include_path else []
    builtin = bool(tasks)
    if args.continuation_task:
        documents = read_documents(args.continuation_task, tokenizer)
        task_folder = write_continuation_task(
            documents, output / "tasks", name=CONTINUATION_TASK, num_questions=args.questions, seed=args.seed
        )
        include_paths.append(task_folder)
        tasks.append(CONTINUATION_TASK)
    loaded = load_tasks(tasks, include_paths=include_paths, builtin=builtin) if tasks else None
    model = load_model(args.model, dtype=args.dtype, device=device(args.device))
    perplexity = _perplexity(args, model, tokenizer) if args.perplexity else None
    scores = None
    if loaded is not None:
        scores = run_tasks(model, tokenizer, loaded, limit=args.limit, batch_size=args.batch_size, seed=args.seed)
    settings = {**vars(args), "tasks": tasks, "device": model.device.type, "output": output}
    print(write_report(output, settings, perplexity, scores), end="")
    print(f"wrote {output / 'results.json'} and {output / 'results.md'}")


def _check(args: argparse.Namespace, tasks: list[str]) -> None:
    if not (tasks or args.perplexity or args.continuation_task):
        raise ConfigError("nothing to run; give --perplexity, --tasks or --continuation-task")
    for option in ("limit", "batch_size", "seq_length", "stride", "questions"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {value}: must be at least 1")
    if args.include_path and not tasks:
        raise ConfigError(f"--include-path {args.include_path}: has no effect without --tasks; name the tasks to run")


def _perplexity(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PerplexityResult:
    from sparsecod_megatron.evaluation.corpus import read_corpus
    from sparsecod_megatron.evaluation.perplexity import perplexity

    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST_DEFAULT_TOKENS
    seq_length = args.seq_length or min(longest, LONGEST_DEFAULT_TOKENS)
    if seq_length > longest:
        raise ConfigError(
            f"--seq-length {seq_length}: the model takes at most {longest} tokens (max_position_embeddings)"
        )
    stride = args.stride or seq_length
    max_tokens = None if args.limit is None else seq_length + (args.limit - 1) * stride
    corpus = read_corpus(args.perplexity, tokenizer, max_tokens=max_tokens)
    return perplexity(
        model,
        corpus.tokens,
        seq_length=seq_length,
        stride=stride,
        batch_size=args.batch_size,
        seed=args.seed,
        num_bytes=corpus.num_bytes,
    )
