"""`sparsecod compress`: a trained model pruned, rounded or factorised, and what that costs in perplexity."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsecod_megatron.cli.options import add_model_options, check_at_least
from sparsecod_megatron.compression.registry import METHODS, find_method
from sparsecod_megatron.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from sparsecod_megatron.compression.compress import Compression
    from sparsecod_megatron.compression.method import Method
    from sparsecod_megatron.evaluation.result import ModelResult

HELP = "Compress a trained model: prune, round or factorise its weights; perplexity on held-out text before and after."
EXAMPLE = "sparsecod compress --model runs/dense --method wanda+cg --data data/x_val --output compressed/dense"


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
    parser.add_argument("--method", required=True, help=methods.replace("%", "%%"))
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
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="model directory to write")
    parser.add_argument(
        "--samples", type=int, default=128, metavar="N", help="calibration sequences drawn (default 128)"
    )
    parser.add_argument("--held-out", type=int, default=128, metavar="N", help="sequences for perplexity (default 128)")
    parser.add_argument("--seq-length", type=int, default=256, metavar="T", help="tokens per sequence (default 256)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of sample and intervals (default 0)")
    parser.add_argument("--batch-size", type=int, default=4, metavar="N", help="sequences per forward pass (default 4)")
    add_model_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model directory")


def run(args: argparse.Namespace) -> None:
    """Compress, write the directory and print the table.

    Raises:
        SparsecodError: arguments, model or data that cannot be used, or nothing that could be compressed.
    """
    from sparsecod_megatron.compression.compress import compress, write_model

    method = find_method(args.method, args.set)
    _check_number(args.model, method)
    check_at_least(args, batch_size=1, samples=1, held_out=1, seq_length=1, seed=0)

    from sparsecod_megatron.compression.calibration import split_text
    from sparsecod_megatron.evaluation.corpus import dataset_prefix, read_corpus
    from sparsecod_megatron.files import check_writable, making_output
    from sparsecod_megatron.models.opening import open_model

    check_writable(args.output)
    dataset_prefix(args.data)  # a wrong path should not wait for the model
    options = {"dtype": args.dtype, "device": args.device, "verify": not args.no_verify}
    with (
        open_model(args.model[0], restored=False, **options) as opened,
        making_output(args.output, overwrite=args.overwrite) as folder,
    ):
        model, tokenizer = opened.model, opened.tokenizer
        text = split_text(
            read_corpus(args.data, tokenizer).tokens,
            num_samples=args.samples,
            num_held_out=args.held_out,
            seq_length=args.seq_length,
            vocab_size=model.config.get_text_config().vocab_size,
            seed=args.seed,
        )
        before = _score(args, "before", model, text.held_out)
        others = (_model(path, options) for path in args.model[1:])
        compression = compress(model, method, text.calibration, batch_size=args.batch_size, others=others)
        after = _score(args, "after", compression.scored, text.held_out)
        write_model(compression, tokenizer, opened.directory, folder)
        report = _report(args, compression, before, after)
        (folder / "compression.json").write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    _print(compression, report)
    print(f"wrote {args.output}")


def _check_number(models: list[Path], method: Method) -> None:
    if len(models) > 1 and not method.needs.several_models:
        raise ConfigError(f"--model: {len(models)} given, and --method {method.name} takes one; give one")
    if len(models) == 1 and method.needs.several_models:
        raise ConfigError(f"--model: one given, and --method {method.name} takes several; give more")


def _model(path: Path, options: dict[str, Any]) -> PreTrainedModel:
    """One of several models, which is gone when nobody holds it any more."""
    from sparsecod_megatron.models.opening import open_model

    with open_model(path, restored=False, **options) as opened:
        return opened.model


def _score(args: argparse.Namespace, name: str, model: PreTrainedModel, tokens: Tensor) -> ModelResult:
    from sparsecod_megatron.evaluation.perplexity import score_windows, summary
    from sparsecod_megatron.evaluation.result import ModelResult

    windows = score_windows(model, tokens, seq_length=args.seq_length, batch_size=args.batch_size)
    return ModelResult(name, perplexity=summary(windows, seed=args.seed), windows=windows)


def _report(
    args: argparse.Namespace, compression: Compression, before: ModelResult, after: ModelResult
) -> dict[str, Any]:
    import torch
    import transformers

    from sparsecod_megatron import __version__
    from sparsecod_megatron.compression.changes import compressed_fraction
    from sparsecod_megatron.compression.modelopt import modelopt_version
    from sparsecod_megatron.evaluation.result import differences

    assert before.perplexity is not None and after.perplexity is not None
    names = ("method", "data", "samples", "held_out", "seq_length", "seed", "batch_size", "dtype")
    settings = {name: getattr(args, name) for name in names}
    model = args.model[0] if len(args.model) == 1 else args.model
    versions = {"sparsecod_megatron": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if compression.method.needs.modelopt:
        versions["modelopt"] = modelopt_version()
    return {
        "settings": {"model": model, **settings, "set": asdict(compression.method.settings)},
        "before": asdict(before.perplexity),
        "after": asdict(after.perplexity),
        "differences": [asdict(difference) for difference in differences(before, after)],
        "compressed_fraction": compressed_fraction(compression.matrices),
        "matrices": [asdict(matrix) for matrix in compression.matrices],
        "num_parameters": dict(zip(("before", "after"), compression.num_parameters, strict=True)),
        "warnings": compression.warnings,
        "versions": versions,
    }


def _print(compression: Compression, report: dict[str, Any]) -> None:
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
        print(f"perplexity {name:6}  {_perplexity_text(report[name])}")
    for row in report["differences"]:
        error = "" if row["stderr"] is None else f" ± {row['stderr']:.3g} (standard error over the same windows)"
        print(f"{row['metric']:10} change  {row['value']:+.4g}{error}")


def _perplexity_text(result: dict[str, Any]) -> str:
    """With its interval, which is that of the loss, raised to the exponent; and of how many tokens."""
    if result["loss_low"] is None:
        return f"{result['perplexity']:.3f} on {result['num_tokens']} tokens"
    low, high = math.exp(result["loss_low"]), math.exp(result["loss_high"])
    return f"{result['perplexity']:.3f} [{low:.3f}, {high:.3f}] on {result['num_tokens']} tokens"
