"""`sparsecod data`: documents to token files, a tokenizer directory and PREFIX.json, all or nothing.

Everything is written to a hidden folder beside the output and renamed when complete, PREFIX.json last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from sparsecod_megatron.data.encode import Encoder, encode_documents
from sparsecod_megatron.data.hub import spool_hub_dataset
from sparsecod_megatron.data.metadata import DatasetInfo, SplitInfo, write_info
from sparsecod_megatron.data.sources import Corpus, open_corpus
from sparsecod_megatron.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_size
from sparsecod_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TRAIN = "train:"
_HUB = "hf:"


@dataclass(frozen=True)
class PreprocessOptions:
    """What `sparsecod data` was asked for.

    Args:
        input: a path, `stdlib`, or `hf:NAME[:CONFIG]`.
        tokenizer: a name or path that `load_tokenizer` knows, or `train:VOCAB`.
        output: PREFIX of everything written.
        workers: tokenizing processes.
        val_fraction: share of the documents held out, at least one document if above 0.
        seed: chooses the documents held out.
        text_key: JSONL field or dataset column that holds the text.
        max_documents: use the first so many; None uses all.
        overwrite: replace an earlier result of the same PREFIX.
    """

    input: str
    tokenizer: str
    output: Path
    workers: int = 1
    val_fraction: float = 0.0
    seed: int = 1234
    text_key: str = "text"
    max_documents: int | None = None
    overwrite: bool = False


def preprocess(options: PreprocessOptions) -> DatasetInfo:
    """Tokenise a corpus.

    Returns:
        What PREFIX.json holds.

    Raises:
        DataError: an impossible option, unreadable text, an unusable tokenizer, or output that exists already.
    """
    _check(options)
    with _staging(options.output) as staging:
        corpus = _open(options, staging)
        held_out = choose_held_out(_count(corpus, options.input), options.val_fraction, options.seed)
        tokenizer = _tokenizer(options.tokenizer, corpus, held_out)
        directory = f"{options.output.name}_tokenizer"
        tokenizer_file = save_tokenizer(tokenizer, staging / directory)
        vocab_size = vocabulary_size(tokenizer)
        dtype = _token_dtype(vocab_size)
        encoder = Encoder(tokenizer_file, tokenizer.eos_token_id, dtype.__name__)
        info = DatasetInfo(
            tokenizer=directory,
            vocab_size=vocab_size,
            eod_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            dtype=dtype.__name__,
            splits=_write_splits(corpus, held_out, encoder, options.workers, staging / options.output.name),
            input=options.input,
            seed=options.seed,
        )
        write_info(info, staging / f"{options.output.name}.json")
        _publish(staging, options.output)
    return info


def choose_held_out(num_documents: int, fraction: float, seed: int) -> np.ndarray:
    """Choose the validation documents.

    Args:
        num_documents: in the corpus.
        fraction: share to hold out; 0 holds none out, anything more at least one.
        seed: of the permutation whose first documents are taken.

    Returns:
        `[num_documents]` bool, True where held out.

    Raises:
        DataError: nothing would be left to train on.
    """
    held_out = np.zeros(num_documents, dtype=bool)
    if fraction > 0:
        count = max(1, round(fraction * num_documents))
        if count >= num_documents:
            message = f"holding out {count} of {num_documents} documents leaves none to train on"
            raise DataError(f"--val-fraction {fraction}: {message}; use a smaller fraction or more documents")
        held_out[np.random.default_rng(seed).permutation(num_documents)[:count]] = True
    return held_out


def _check(options: PreprocessOptions) -> None:
    if options.workers < 1:
        raise DataError(f"--workers {options.workers}: must be at least 1")
    if not 0 <= options.val_fraction < 1:
        raise DataError(f"--val-fraction {options.val_fraction}: must be at least 0 and below 1")
    if options.max_documents is not None and options.max_documents < 1:
        raise DataError(f"--max-documents {options.max_documents}: must be at least 1")
    if not options.output.name:
        raise DataError(f"--output {options.output}: must end in a name, the PREFIX of the files to write")
    existing = [path for path in _outputs(options.output) if path.exists()]
    if existing and not options.overwrite:
        raise DataError(f"{existing[0]}: exists already; choose another --output or add --overwrite")


def _outputs(prefix: Path) -> list[Path]:
    """Every path that a PREFIX can own; PREFIX.json first, because it vouches for the others."""
    suffixes = [".json", "_train.bin", "_train.idx", "_val.bin", "_val.idx", "_tokenizer"]
    return [prefix.with_name(prefix.name + suffix) for suffix in suffixes]


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A folder on the output's own file system, gone at the end whatever happens."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
    except OSError as error:
        raise DataError(f"{output.parent}: cannot be written ({error.strerror}); choose another --output") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging)


def _open(options: PreprocessOptions, staging: Path) -> Corpus:
    if not options.input.startswith(_HUB):
        return open_corpus(options.input, options.text_key, options.max_documents)
    spool = staging / "spool.jsonl"
    spool_hub_dataset(options.input.removeprefix(_HUB), options.text_key, options.max_documents, spool)
    return open_corpus(str(spool), options.text_key)


def _count(corpus: Corpus, source: str) -> int:
    count = sum(1 for _ in tqdm(corpus, desc="reading", unit=" documents", disable=None))
    if count == 0:
        raise DataError(f"{source}: no documents with text in it; check the input")
    return count


def _tokenizer(name: str, corpus: Corpus, held_out: np.ndarray) -> PreTrainedTokenizerFast:
    if not name.startswith(_TRAIN):
        return load_tokenizer(name)
    size = name.removeprefix(_TRAIN)
    if not size.isdecimal():
        raise DataError(f"--tokenizer {name}: {size!r} is no vocabulary size; write for example train:4096")
    texts = (text for text, held in zip(corpus, held_out, strict=True) if not held)
    training = int((~held_out).sum())
    return train_tokenizer(tqdm(texts, desc="tokenizer", unit=" documents", total=training, disable=None), int(size))


def _token_dtype(vocab_size: int) -> type[np.integer]:
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab_size)


def _write_splits(
    corpus: Corpus, held_out: np.ndarray, encoder: Encoder, workers: int, prefix: Path
) -> dict[str, SplitInfo]:
    from sparsecod_megatron.data.writer import SplitWriter

    names = ["train", "val"] if held_out.any() else ["train"]
    dtype = np.dtype(encoder.dtype).type
    with ExitStack() as stack:
        writers = [stack.enter_context(SplitWriter(prefix.with_name(f"{prefix.name}_{name}"), dtype)) for name in names]
        documents = encode_documents(corpus, encoder, workers)
        progress = tqdm(documents, desc="tokens", unit=" documents", total=len(held_out), disable=None)
        for document, held in zip(progress, held_out, strict=True):
            writers[int(held)].add(document.tokens, document.num_bytes)
        return {name: writer.finish() for name, writer in zip(names, writers, strict=True)}


def _publish(staging: Path, output: Path) -> None:
    """Rename everything into place; an interruption here leaves no PREFIX.json beside a mixture."""
    for path in _outputs(output):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for path in reversed(_outputs(output)):
        staged = staging / path.name
        if staged.exists():
            staged.replace(path)
