"""`sparsecod analyze`: how a trained model uses its depth."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecod_megatron.cli.analysis_task import add_task_options, data_of, requested_task
from sparsecod_megatron.cli.launch import share_work
from sparsecod_megatron.cli.options import add_model_options, check_above_zero, check_at_least, names
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.analysis.analyze import Analysis
    from sparsecod_megatron.parallel.processes import Processes

HELP = "Measure how a trained model uses its depth, or compare two models measured on the same text."
EXAMPLE = (
    "sparsecod analyze runs/dense --data data/x_val --scores causal,jacobian --samples 64 --output analysis\n"
    "  sparsecod analyze --compare analysis/dense analysis/moe --output comparison\n"
    "  sparsecod analyze models/smollm --scores answers --task addition --samples 256 --output analysis/answers\n"
    "  sparsecod analyze runs/dense --every-checkpoint --data data/x_val --output analysis/over_training\n"
    "  sparsecod analyze runs/dense/checkpoints/step_00001000 runs/dense --scores update --output update"
)
UPDATE = "update"
"""The score that takes models before and after, and no data."""
MEASURED_WITH = (
    "samples",
    "seq_length",
    "seed",
    "dtype",
    "pairs",
    "budgets",
    "gate_steps",
    "curve_score",
    "curve_pattern",
    "compat",
    "difficulties",
    "skip_epsilon",
)
"""Options besides data and scores that numbers depend on, so that a series keeps them."""
DEFAULT_SCORES = "causal,permutation,usefulness,jacobian,similarity,skip,lens"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model",
        type=Path,
        nargs="*",
        metavar="MODEL_DIR",
        help="HuggingFace model directory, or a training run or one of its step directories; for `--scores update` the "
        "one before and the one after, and a third to see what two updates changed alike; for --every-checkpoint a "
        "run, a folder of revisions, or several models",
    )
    parser.add_argument(
        "--data", type=Path, metavar="PREFIX_OR_TEXT", help="held-out dataset prefix or UTF-8 text file"
    )
    parser.add_argument(
        "--scores", default=DEFAULT_SCORES, metavar="A,B", help=f"comma-separated (default {DEFAULT_SCORES})"
    )
    add_task_options(parser)
    parser.add_argument(
        "--skip-epsilon", type=float, metavar="E", help="nats by which token_skip counts a token's loss (default 0.1)"
    )
    parser.add_argument(
        "--pairs", metavar="N", help="pairs of blocks that permutation samples, or `adjacent` (default all)"
    )
    parser.add_argument(
        "--budgets",
        metavar="B,C",
        help="shares of the keys for sparse_attention, seer_gate (default 1,0.5,0.25,0.1,0.05)",
    )
    parser.add_argument(
        "--gate-steps", type=int, metavar="N", help="steps that seer_gate trains its gates (default 300)"
    )
    parser.add_argument(
        "--curve-score", metavar="S", help="what the pruning curve of weights cuts by: magnitude (default) or wanda"
    )
    parser.add_argument("--curve-pattern", metavar="N:M,…", help="n:m points beside that curve, such as 2:4,1:4")
    parser.add_argument(
        "--samples", type=int, default=64, metavar="N", help="sequences drawn, or questions of a task (default 64)"
    )
    parser.add_argument("--seq-length", type=int, default=128, metavar="T", help="tokens per sequence (default 128)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of sample and intervals (default 0)")
    add_model_options(parser)
    parser.add_argument(
        "--memory-gib", type=float, default=2.0, metavar="G", help="memory for one process's micro-batch (default 2)"
    )
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="processes on this machine, each with a share of the sample"
    )
    parser.add_argument(
        "--compat", choices=("reference",), help="also compute the reference code's own numbers, named ref_*"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="two analysis directories, instead of MODEL_DIR"
    )
    parser.add_argument(
        "--every-checkpoint",
        action="store_true",
        help="every checkpoint of a run, each model of a folder or each of several, and the changes from one to the "
        "next; the same command again adds what is new",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="scores.json, *.csv and plots/*.png")


def run(args: argparse.Namespace) -> None:
    """Analyse a model, or compare two analyses, and print the numbers.

    Raises:
        SparsecodError: arguments, model or data that cannot be used.
    """
    from sparsecod_megatron.analysis.scores.registry import needs_text
    from sparsecod_megatron.files import check_writable

    check_writable(args.output)
    if args.every_checkpoint and (args.compare or UPDATE in names(args.scores)):
        raise ConfigError(f"--every-checkpoint: measures models one by one; leave --compare and {UPDATE} out")
    if args.compare:
        if args.model or args.data:
            raise ConfigError("--compare: takes two analysis directories; leave MODEL_DIR and --data out")
        first, second = args.compare
        _compare(first, second, args.output)
        return
    if UPDATE in names(args.scores):
        _update(args)
        return
    requested_task(args)
    if not args.model:
        raise ConfigError("nothing to analyse; give MODEL_DIR and --data, or --compare A B")
    if args.data is None and needs_text(names(args.scores)):
        raise ConfigError(f"--scores {args.scores}: measured on text, and none is given; give --data PREFIX_OR_TEXT")
    if len(args.model) > 1 and not args.every_checkpoint:
        raise ConfigError(
            f"{len(args.model)} models given, and only --every-checkpoint and --scores {UPDATE} take several; give one"
        )
    check_at_least(args, samples=1, seq_length=1, seed=0)
    check_above_zero(args, "memory_gib")
    share_work(args, lambda processes: (_series if args.every_checkpoint else _analyze)(args, processes))


def _analyze(args: argparse.Namespace, processes: Processes) -> None:
    analysis = _measure(args, args.model[0], {}, processes)
    if processes.is_first:
        _write(analysis, args.output)


def _series(args: argparse.Namespace, processes: Processes) -> None:
    from sparsecod_megatron.cli.analysis_series import run_series

    request = {key: getattr(args, key) for key in MEASURED_WITH} | {
        "scores": names(args.scores),
        **_sources(args),
    }
    whole = run_series(
        args.model, args.output, request, lambda path, facts: _measure(args, path, facts, processes), processes
    )
    if processes.is_first:
        _print(whole)
        _print_changes(whole)
        print(f"wrote {args.output}: {len(whole.settings['points'])} models")


def _print_changes(whole: Analysis) -> None:
    """The last change of every number that it can be told of."""
    from sparsecod_megatron.analysis.series import CHANGES

    for score, result in whole.results.items():
        rows = result.tables.get(f"{score}{CHANGES}", [])
        for row in (row for row in rows if row["to"] == rows[-1]["to"] and row["separated"]):
            interval = f"[{row['low']:+.4g}, {row['high']:+.4g}]"
            print(f"{score:12} {row['name']:32} {row['difference']:+.4g} {interval} since {row['from']}")


def _measure(args: argparse.Namespace, path: Path, facts: dict[str, Any], processes: Processes) -> Analysis:
    """Analyse one model, and record the facts. Collective over the processes."""
    from sparsecod_megatron.analysis.analyze import analyze
    from sparsecod_megatron.analysis.scores.registry import find_scores
    from sparsecod_megatron.evaluation.corpus import dataset_prefix
    from sparsecod_megatron.models.measured import context_of
    from sparsecod_megatron.models.opening import open_model

    budgets = None if args.budgets is None else names(args.budgets)
    scores = find_scores(
        names(args.scores),
        pairs=args.pairs,
        budgets=budgets,
        gate_steps=args.gate_steps,
        curve_score=args.curve_score,
        skip_epsilon=args.skip_epsilon,
        curve_patterns=None if args.curve_pattern is None else names(args.curve_pattern),
    )
    if args.data is not None:
        dataset_prefix(args.data)  # a wrong path should not wait for the model
    with open_model(
        path,
        dtype=args.dtype,
        device=args.device,
        verify=not args.no_verify,
        restored=False,  # what is rounded has no derivative, of which Jacobians are made
        processes=processes,
    ) as opened:
        context = context_of(
            opened,
            names(args.scores),
            model=str(path),
            text=args.data,
            task=requested_task(args),
            data=data_of(path),
            num_samples=args.samples,
            seq_length=args.seq_length,
            seed=args.seed,
            memory_gib=args.memory_gib,
            reference=args.compat == "reference",
            processes=processes,
        )
    return analyze(context, scores, settings={"model": str(path), **_sources(args), **facts})


def _sources(args: argparse.Namespace) -> dict[str, str]:
    """Where text and questions come from, as far as there are any."""
    return {key: str(value) for key in ("data", "task") if (value := getattr(args, key)) is not None}


def _update(args: argparse.Namespace) -> None:
    if names(args.scores) != [UPDATE] or args.data is not None or args.nproc != 1:
        raise ConfigError(f"--scores {UPDATE}: compares weights; leave --data, --nproc and other scores out")
    if len(args.model) not in (2, 3):
        raise ConfigError(
            f"--scores {UPDATE}: {len(args.model)} models given; give the one before and the one after, and perhaps a "
            "third to compare the update with"
        )

    from sparsecod_megatron.analysis.analyze import Analysis
    from sparsecod_megatron.analysis.update import measure_update
    from sparsecod_megatron.hf.source import SafetensorsFiles
    from sparsecod_megatron.models.opening import open_model

    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(open_model(path, verify=not args.no_verify, reads_text=False)) for path in args.model
        ]
        result = measure_update(*(SafetensorsFiles(model.directory) for model in opened))
    _write(Analysis({"models": [str(path) for path in args.model]}, {UPDATE: result}), args.output)


def _write(analysis: Analysis, output: Path) -> None:
    from sparsecod_megatron.analysis.analyze import write_analysis

    files = write_analysis(analysis, output)
    _print(analysis)
    print(f"wrote {output}: {len(files)} files")


def _compare(first: Path, second: Path, output: Path) -> None:
    from sparsecod_megatron.analysis.compare import compare, comparison_json
    from sparsecod_megatron.files import write_text

    differences = compare(first, second)
    write_text(output / "comparison.json", comparison_json(first, second, differences))
    for row in differences:
        interval = "" if row.low is None else f" [{row.low:+.4g}, {row.high:+.4g}]"
        verdict = "" if row.separated else "  not separated by this sample; raise --samples"
        print(f"{row.name:32} {row.first:.4g} → {row.second:.4g}  {row.difference:+.4g}{interval}{verdict}")
    print(f"wrote {output / 'comparison.json'}")


def _print(analysis: Analysis) -> None:
    for score, result in analysis.results.items():
        for name, value in result.values.items():
            print(f"{score:12} {name:32} {_shown(value)}")
        for warning in result.warnings:
            print(f"{score:12} warning: {warning}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        if value.get("low") is None:
            return _shown(value.get("value"))
        return f"{_shown(value['value'])} [{_shown(value['low'])}, {_shown(value['high'])}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
