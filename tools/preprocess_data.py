"""`preprocess_data.py` as users of Megatron-LM know it, run as `sparsecod data`.

    python tools/preprocess_data.py --input text.jsonl --output-prefix data/text --tokenizer-type HuggingFaceTokenizer \
        --tokenizer-model NAME --workers 8 --append-eod

The token files are PREFIX_train.bin and PREFIX_train.idx, and load in Megatron-LM with `--data-path PREFIX_train`.
"""

from __future__ import annotations

import argparse
import sys

from sparsecod_megatron.cli.main import main as sparsecod


def main() -> int:
    """Translate the arguments and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True)
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--tokenizer-model", required=True, help="HuggingFace name or path, sentencepiece .model")
    parser.add_argument(
        "--tokenizer-type",
        default="HuggingFaceTokenizer",
        choices=["HuggingFaceTokenizer", "SentencePieceTokenizer", "GPTSentencePieceTokenizer", "Llama2Tokenizer"],
        help="accepted as it is: the file given as --tokenizer-model tells",
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json-keys", default="text", help="the one JSONL field to tokenise")
    parser.add_argument("--append-eod", action="store_true", help="always on here")
    args = parser.parse_args()
    arguments = ["data", "--input", args.input, "--output", args.output_prefix, "--tokenizer", args.tokenizer_model]
    return sparsecod([*arguments, "--workers", str(args.workers), "--text-key", args.json_keys])


if __name__ == "__main__":
    sys.exit(main())
