"""`sparsecod compress`: a trained model pruned, rounded or factorised, and what that costs in perplexity."""

from __future__ import annotations

import argparse
import shlex
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecod_megatron.cli.launch import share_work
from sparsecod_megatron.cli.options import add_model_options, check_at_least, names
from sparsecod_megatron.compression.registry import LATER_WORDS, METHODS, method_class
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from sparsecod_megatron.compression.compress import Compression
    from sparsecod_megatron.parallel.processes import Processes
    from sparsecod_megatron.studies.compressions import Cell, Request

HELP = "Compress a trained model: prune, round or factorise its weights; perplexity on held-out text before and after."
EXAMPLE = (
    "sparsecod compress --model runs/dense --method wanda+cg --data data/x_val --output compressed/dense\n"
    "  sparsecod compress --model runs/dense --method wanda,sparsegpt --pattern 0.5,2:4 --scores causal "
    "--data data/x_val --output table"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--model",
        type=Path,
        nargs="+",
        required=True,
        metavar="DIR",
        help="HuggingFace model directory, or a training run; several for a method that takes several",
    )
    methods = "; ".join(f"{name}: {entry.summary}" for name, entry in METHODS.items())
    later = "; ".join(f"+{word}: {summary}" for word, summary in LATER_WORDS.items())
    summaries = f"one, or A,B for a table of several. {methods}; after a pruning rule {later}"
    parser.add_argument("--method", required=True, metavar="A,B+C", help=summaries.replace("%", "%%"))
    parser.add_argument(
        "--pattern",
        metavar="P,Q",
        help="of pruning: a share to drop (0.5), n:m (n stay) or group:g:share; each method with each (default 0.5)",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the method (docs/COMPRESSION.md)"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="PREFIX_OR_TEXT",
        help="dataset prefix or UTF-8 text file: its end for perplexity, sequences drawn from the rest for calibration",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="DIR",
        help="model directory to write; for a table DIR/METHOD_PATTERN and DIR/table.{md,csv,json}",
    )
    parser.add_argument("--scores", metavar="A,B", help="depth scores before and after, as of `sparsecod analyze`")
    parser.add_argument(
        "--keep", choices=("all", "none"), default="all", help="models to write; none leaves the table (default all)"
    )
    parser.add_argument(
        "--samples", type=int, default=128, metavar="N", help="calibration sequences drawn (default 128)"
    )
    parser.add_argument("--held-out", type=int, default=128, metavar="N", help="sequences for perplexity (default 128)")
    parser.add_argument("--seq-length", type=int, default=256, metavar="T", help="tokens per sequence (default 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of sample and intervals (default 0)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences per forward pass (default 4)")
    parser.add_argument(
        "--nproc", type=int, default=1, metavar="N", help="processes on this machine that share sequences and matrices"
    )
    parser.add_argument(
        "--stream",
        action="store_true",
        help="have one block in memory at a time, read from safetensors, with the same results (pruning without gblm)",
    )
    add_model_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model directory")


def run(args: argparse.Namespace) -> None:
    """Compress, write the directory and print the table; several methods or patterns make one table.

    Raises:
        SparsecodError: arguments, model or data that cannot be used, or nothing that could be compressed.
    """
    methods = names(args.method)
    if not methods:
        raise ConfigError(f"--method {args.method!r}: names none; use {', '.join(METHODS)}")
    for name in methods:
        _check_number(args.model, name)
    check_at_least(args, batch_size=1, samples=1, held_out=1, seq_length=1, seed=0)
    share_work(args, lambda processes: _compress(args, methods, processes))


def _compress(args: argparse.Namespace, methods: list[str], processes: Processes) -> None:
    from sparsecod_megatron.evaluation.corpus import dataset_prefix
    from sparsecod_megatron.files import check_writable
    from sparsecod_megatron.studies.compressions import Request, compress_once, make_cells

    cells = make_cells(methods, names(args.pattern), args.set)
    check_writable(args.output)
    dataset_prefix(args.data)  # a wrong path should not wait for the model
    shared = ("data", "output", "samples", "held_out", "seq_length", "seed", "batch_size", "dtype", "device")
    request = Request(
        models=tuple(args.model),
        **{name: getattr(args, name) for name in shared},
        verify=not args.no_verify,
        scores=tuple(names(args.scores)),
        keep=args.keep == "all",
        overwrite=args.overwrite,
        stream=args.stream,
    )
    if args.stream:
        _check_streams(request, cells)
    if len(cells) > 1 or request.scores or not request.keep:
        _tabulate(request, cells, args.command_line, processes)
        return
    compression, report = compress_once(request, cells[0], processes)
    if processes.is_first:
        _print(compression, report)
        print(f"wrote {args.output}")


def _tabulate(request: Request, cells: list[Cell], command_line: list[str], processes: Processes) -> None:
    """Make the rows, and write the table again after each, so that there is always one of what is done."""
    from sparsecod_megatron.analysis.scores.registry import find_scores
    from sparsecod_megatron.studies.compression_table import perplexity_text, write_table
    from sparsecod_megatron.studies.compressions import compress_all

    if request.scores:
        find_scores(list(request.scores))  # an unknown one should not wait for the model
    rows: list[dict[str, Any]] = []
    text = ""
    for row in compress_all(request, cells, processes):
        rows.append(row)
        if processes.is_first:
            print(f"{row['method']} {row['pattern']}: perplexity {perplexity_text(row['perplexity'])}", flush=True)
            text = write_table(request.output, rows, shlex.join(["sparsecod", "compress", *command_line[1:]]))
    if processes.is_first:
        print(text, end="")
        print(f"wrote {request.output}")


def _check_number(models: list[Path], name: str) -> None:
    several = method_class(name).needs.several_models
    if len(models) > 1 and not several:
        raise ConfigError(f"--model: {len(models)} given, and --method {name} takes one; give one")
    if len(models) == 1 and several:
        raise ConfigError(f"--model: one given, and --method {name} takes several; give more")


def _check_streams(request: Request, cells: list[Cell]) -> None:
    from sparsecod_megatron.analysis.scores.registry import LOOKING_AT_ALL_WEIGHTS

    whole = next((cell.method.name for cell in cells if cell.method.needs.whole_model), None)
    if whole is not None:
        raise ConfigError(f"--stream: --method {whole} needs the whole model at once; leave --stream out")
    at_once = next((name for name in request.scores if name in LOOKING_AT_ALL_WEIGHTS), None)
    if at_once is not None:
        raise ConfigError(f"--stream: --scores {at_once} looks at the weights of all blocks at once; leave one out")


def _print(compression: Compression, report: dict[str, Any]) -> None:
    from sparsecod_megatron.studies.compression_table import perplexity_text

    kinds = defaultdict(list)
    for matrix in compression.matrices:
        if matrix.compressed:
            kinds[matrix.kind].append(matrix)
    width = max(map(len, kinds))
    print(f"{'matrices':{width}}  count      weights   zeros  error (largest)")
    for kind, rows in kinds.items():
        errors = [row.relative_error for row in rows if row.relative_error is not None]
        weights = sum(row.stored for row in rows)
        zeros = sum(row.zeros * row.stored for row in rows) / weights
        error = f"{sum(errors) / len(errors):.4f} ({max(errors):.4f})" if errors else "not measured"
        print(f"{kind:{width}}  {len(rows):5d}  {weights:11,d}  {zeros:6.2%}  {error}")
    print(f"compressed: {report['compressed_fraction']:.2%} of the weights outside embeddings and output layer")
    before, after = compression.num_parameters
    if after != before:
        print(f"parameters: {before:,} before, {after:,} after ({after / before:.2%})")
    for warning in report["warnings"]:
        print(f"warning: {warning}")
    for name in ("before", "after"):
        print(f"perplexity {name:6}  {perplexity_text(report[name])} on {report[name]['num_tokens']} tokens")
    for row in report["differences"]:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.3g} (standard error over the same windows)"
        print(f"{row['metric']:10} change  {row['value']:+.4g}{error}")
