"""`sparsecod data`: text to token files."""

from __future__ import annotations

import argparse
import decimal
import os
from pathlib import Path

HELP = "Tokenise text into Megatron's IndexedDataset, with a held-out split and the tokenizer beside it."
EXAMPLE = "sparsecod data --input stdlib --tokenizer train:4096 --output data/stdlib --val-fraction 0.02"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--input",
        required=True,
        help="a text file, JSON lines or array (.jsonl .ndjson .jsonlines .json), each plain, .gz or .zst, a .parquet "
        "file, a directory of these and of .txt .md .rst .py files, `stdlib` (Python's own library: real text on "
        "every machine), or hf:NAME[:CONFIG] (a HuggingFace dataset, streamed; a directory of data files or one saved "
        "with save_to_disk)",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        help="a HuggingFace name or directory, a tokenizer.json, a sentencepiece .model, a .tiktoken file of ranks, "
        "or train:VOCAB (byte-level BPE trained on the training split)",
    )
    parser.add_argument(
        "--output", required=True, type=Path, metavar="PREFIX", help="prefix of the names of all files written"
    )
    parser.add_argument(
        "--workers", type=int, default=_usable_cores(), help="tokenizing processes (default: %(default)s, every core)"
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.0, help="share of the documents held out (default: none)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="chooses the documents held out (default: %(default)s)")
    parser.add_argument(
        "--text-key", default="text", help="JSON field or dataset column with the text (default: %(default)s)"
    )
    parser.add_argument("--max-documents", type=int, help="use only the first MAX_DOCUMENTS documents")
    parser.add_argument(
        "--max-tokens", type=_whole_number, help="stop after the document that reaches this number (1e9)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result with the same PREFIX")


def run(args: argparse.Namespace) -> None:
    """Write the data set and say what it holds."""
    from sparsecod_megatron.data.options import PreprocessOptions
    from sparsecod_megatron.data.preprocess import preprocess

    result = preprocess(PreprocessOptions(**vars(args)))
    info = result.info
    for name, split in info.splits.items():
        size = f"{split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text"
        print(f"{args.output}_{name}.bin  {size}")
    print(f"{args.output}_tokenizer  {info.vocab_size:,} entries, end-of-document id {info.eod_token_id}")
    if result.seconds > 0:
        rates = (
            f"{result.tokens / result.seconds:,.0f} tokens/s, {result.bytes / result.seconds / 1e6:.2f} MB/s of text"
        )
        print(f"{result.seconds:.1f} s of tokenizing with {args.workers} processes: {rates}")


def _whole_number(text: str) -> int:
    """`1000000000` or `1e9`."""
    try:
        number = decimal.Decimal(text)
        if number.is_finite() and number == number.to_integral_value():
            return int(number)
    except decimal.InvalidOperation:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number; write for example 1000000 or 1e6")


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
