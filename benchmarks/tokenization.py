"""Tokens per second and core of `sparsecod data`, against the bare call of the library that does the work.

    python benchmarks/tokenization.py --text FILE --tokenizer tokenizer.json

Both sides run on one core and alternate, so that a slow moment of the machine meets both alike; CPU time counts.
`tokenizers.encode_batch` returns encodings in memory; ours reads the documents from a JSONL file, tokenizes them, and
writes and commits token files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # read at the library's first call

from sparsecod_megatron.data.encode import Encoder, encode_documents, load_encoding_tokenizer
from sparsecod_megatron.data.sources import open_corpus
from sparsecod_megatron.data.splits import SplitsWriter
from sparsecod_megatron.data.staging import Journal
from sparsecod_megatron.data.tokenizer import load_tokenizer, save_tokenizer, vocabulary_size


def main() -> None:
    """Measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="any input that `sparsecod data` takes as a path")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(json.dumps(measure(args.text, args.tokenizer, args.rounds, Path(name))))


def measure(source: str, tokenizer_name: str, rounds: int, folder: Path) -> dict[str, float]:
    """Median rates of both sides, and ours ÷ theirs."""
    import numpy as np

    tokenizer = load_tokenizer(tokenizer_name)
    file = save_tokenizer(tokenizer, folder / "tokenizer")
    texts = list(open_corpus(source))
    jsonl = folder / "texts.jsonl"
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    backend = load_encoding_tokenizer(file)
    vocab_size = vocabulary_size(tokenizer)
    dtype = np.uint16 if vocab_size < 65_500 else np.int32
    encoder = Encoder(file, tokenizer.eos_token_id, dtype.__name__)
    num_bytes = sum(len(text.encode()) for text in texts)

    def theirs() -> int:
        return sum(len(encoding.ids) for encoding in backend.encode_batch(texts, add_special_tokens=False))

    def ours() -> int:
        for stale in folder.glob("out*"):
            stale.unlink()
        with SplitsWriter(folder / "out", dtype, vocab_size, None, Journal({})) as splits:
            for document in encode_documents(open_corpus(str(jsonl)), encoder, workers=1):
                splits.add(document)
            return splits.finish()["train"].tokens

    theirs(), ours()
    times = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    tokens = ours()
    library, own = (statistics.median(column) for column in zip(*times, strict=True))
    return {
        "tokens": tokens,
        "tokenizers_tokens_per_s": tokens / library,
        "ours_tokens_per_s": tokens / own,
        "ours_mb_per_s": num_bytes / own / 1e6,
        "ratio": statistics.median(library / own for library, own in times),
    }


def seconds(work: Callable[[], int]) -> float:
    """CPU time of one call, over all threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
