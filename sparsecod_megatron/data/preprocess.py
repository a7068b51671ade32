"""`sparsecod data`: documents to token files, a tokenizer directory and PREFIX.json, all or nothing.

A process that was killed resumes where it last committed: the files on disk are cut back to that point, and the
documents before it are read but not tokenized again. Nothing of the output depends on how often that happens.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tqdm import tqdm

from sparsecod_megatron.data.encode import Encoder, encode_documents
from sparsecod_megatron.data.hub import open_hub_dataset, spool_hub_dataset
from sparsecod_megatron.data.index_file import token_dtype
from sparsecod_megatron.data.metadata import DatasetInfo, SplitInfo, read_info, write_info
from sparsecod_megatron.data.options import HUB, TRAIN, PreprocessOptions
from sparsecod_megatron.data.sources import Corpus, open_corpus
from sparsecod_megatron.data.staging import Journal, is_complete, output_paths, publish, staging_folder
from sparsecod_megatron.data.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer, vocabulary_size
from sparsecod_megatron.data.tokenizer_identity import tokenizer_digest
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.files import making

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FORMAT = 2


@dataclass(frozen=True)
class PreprocessResult:
    """What PREFIX.json holds, and what this process did for it: tokens, bytes of text, seconds spent tokenizing."""

    info: DatasetInfo
    tokens: int
    bytes: int
    seconds: float


def preprocess(options: PreprocessOptions) -> PreprocessResult:
    """Tokenise a corpus, or resume it.

    Raises:
        DataError: unreadable text, an unusable tokenizer, output that exists already, or a disk that is full.
    """
    corpus = _open(options)
    try:
        with staging_folder(options.output, _job(options, corpus), overwrite=options.overwrite) as (staging, journal):
            if is_complete(staging, options.output):
                result = PreprocessResult(read_info(staging / options.output.name), 0, 0, 0.0)
            else:
                _refuse_existing(options)
                result = _Run(options, corpus, staging, journal).run()
            publish(staging, options.output)
    except OSError as error:
        message = "fix that and run the same command again; it resumes from there"
        raise DataError(f"{error.filename or options.output}: {error.strerror or error}; {message}") from error
    return result


def choose_held_out(num_documents: int, fraction: float, seed: int) -> np.ndarray:
    """Choose the validation documents.

    Args:
        num_documents: in the corpus.
        fraction: share to hold out; 0 holds none out, anything more at least one.
        seed: seed of the permutation whose first documents are taken.

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


class _Run:
    """One process's part of a job, up to the complete result in the staging folder."""

    def __init__(self, options: PreprocessOptions, corpus: Corpus, staging: Path, journal: Journal) -> None:
        self.options, self.corpus, self.staging, self.journal = options, corpus, staging, journal
        self.prefix = staging / options.output.name
        if options.input.startswith(HUB) and options.reads_twice:
            spool = staging / "spool.jsonl"
            spool_hub_dataset(options.input.removeprefix(HUB), options.text_key, options.max_documents, spool)
            self.corpus = open_corpus(str(spool), options.text_key)

    def run(self) -> PreprocessResult:
        """Do all the remaining work."""
        held_out = self._held_out()
        tokenizer = self._tokenizer(held_out)
        vocab_size = vocabulary_size(tokenizer)
        directory = self._named("_tokenizer")
        dtype = token_dtype(vocab_size)
        encoder = Encoder(directory / "tokenizer.json", tokenizer.eos_token_id, dtype.__name__)
        before = list(self.journal.splits.values())
        began = time.perf_counter()
        splits = self._tokenize(held_out, encoder, vocab_size)
        seconds = time.perf_counter() - began
        info = DatasetInfo(
            tokenizer=directory.name,
            vocab_size=vocab_size,
            eod_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            dtype=dtype.__name__,
            splits=splits,
            input=self.options.input,
            seed=self.options.seed,
            tokenizer_digest=tokenizer_digest(tokenizer),
        )
        write_info(info, self._named(".json"))
        tokens = sum(split.tokens for split in splits.values()) - sum(split.tokens for split in before)
        num_bytes = sum(split.bytes for split in splits.values()) - sum(split.bytes for split in before)
        return PreprocessResult(info, tokens, num_bytes, seconds)

    def _named(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    def _held_out(self) -> np.ndarray | None:
        """`[documents]` bool, True where held out; None holds none out, and spares counting them."""
        if self.options.val_fraction == 0:
            return None
        if self.journal.num_documents is None:
            self.journal.num_documents = sum(1 for _ in tqdm(self.corpus, "reading", unit=" documents", disable=None))
            self.journal.save(self.staging)
        if self.journal.num_documents == 0:
            raise _no_documents(self.options)
        return choose_held_out(self.journal.num_documents, self.options.val_fraction, self.options.seed)

    def _tokenizer(self, held_out: np.ndarray | None) -> PreTrainedTokenizerFast:
        """The tokenizer of the output; a directory under its final name is complete."""
        directory = self._named("_tokenizer")
        if not directory.exists():
            with making(directory) as unfinished:
                save_tokenizer(self._make_tokenizer(held_out), unfinished)
        return load_tokenizer(str(directory))

    def _make_tokenizer(self, held_out: np.ndarray | None) -> PreTrainedTokenizerFast:
        name = self.options.tokenizer
        if not name.startswith(TRAIN):
            return load_tokenizer(name)
        held = itertools.repeat(False) if held_out is None else held_out
        texts = (text for text, is_held in zip(self.corpus, held, strict=False) if not is_held)
        size = int(name.removeprefix(TRAIN))
        return train_tokenizer(tqdm(texts, "tokenizer", unit=" documents", disable=None), size)

    def _tokenize(self, held_out: np.ndarray | None, encoder: Encoder, vocab_size: int) -> dict[str, SplitInfo]:
        from sparsecod_megatron.data.splits import SplitsWriter

        options, journal = self.options, self.journal
        texts = itertools.islice(self.corpus, journal.documents, journal.num_documents)
        total, done = journal.num_documents, journal.documents
        with (
            SplitsWriter(self.prefix, np.dtype(encoder.dtype).type, vocab_size, held_out, journal) as splits,
            closing(encode_documents(texts, encoder, options.workers)) as documents,
            tqdm(desc="tokens", unit=" documents", total=total, initial=done, disable=None) as progress,
        ):
            committed = time.monotonic()
            for document in documents:
                if options.max_tokens is not None and splits.num_tokens >= options.max_tokens:
                    break
                splits.add(document)
                progress.update()
                if time.monotonic() - committed >= options.commit_interval_s:
                    splits.commit()
                    committed = time.monotonic()
            else:
                if journal.num_documents not in (None, journal.documents):
                    message = f"{journal.documents} documents, but {journal.num_documents} a moment ago"
                    raise DataError(f"{options.input}: {message}; it must not change while it is read")
            infos = splits.finish()
        if journal.documents == 0:
            raise _no_documents(options)
        for name, info in infos.items():
            if info.documents == 0:
                raise DataError(f"--max-tokens {options.max_tokens}: reached before any document of {name}; raise it")
        return infos


def _open(options: PreprocessOptions) -> Corpus:
    if options.input.startswith(HUB):
        return open_hub_dataset(options.input.removeprefix(HUB), options.text_key, options.max_documents)
    return open_corpus(options.input, options.text_key, options.max_documents)


def _job(options: PreprocessOptions, corpus: Corpus) -> dict[str, Any]:
    """Everything that decides the output; the number of workers does not."""
    files = hashlib.sha256()
    for path in corpus.files:
        state = path.stat()
        files.update(os.fsencode(path) + f"\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    names = ("input", "text_key", "max_documents", "max_tokens", "tokenizer", "val_fraction", "seed")
    return {
        "format": _FORMAT,
        **{name: getattr(options, name) for name in names},
        "input files": files.hexdigest(),
        "tokenizers version": tokenizers.__version__,
    }


def _refuse_existing(options: PreprocessOptions) -> None:
    existing = [path for path in output_paths(options.output) if path.exists()]
    if existing and not options.overwrite:
        raise DataError(f"{existing[0]}: exists already; choose another --output or add --overwrite")


def _no_documents(options: PreprocessOptions) -> DataError:
    return DataError(f"{options.input}: no documents with text in it; check the input")
