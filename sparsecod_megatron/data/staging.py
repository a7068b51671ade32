"""Where output lies until it is complete: a hidden folder beside it that the next process with the same job takes over.

    .PREFIX.partial/lock            held by the process at work
    .PREFIX.partial/journal.json    the job, and what of it is on disk
    .PREFIX.partial/…               the files to be, under their final names

A file that is named after its content is final: `PREFIX.json` is written last, and from then on only renames are left.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sparsecod_megatron.data.metadata import read_info
from sparsecod_megatron.data.writer import SplitProgress
from sparsecod_megatron.errors import DataError
from sparsecod_megatron.files import write_text

_JOURNAL, _LOCK = "journal.json", "lock"


@dataclass
class Journal:
    """Progress of a job.

    Attributes:
        job: everything that decides the output.
        num_documents: size of the corpus, once counted.
        documents: documents of the corpus, tokenized and on disk.
        splits: progress on these, by split.
    """

    job: dict[str, Any]
    num_documents: int | None = None
    documents: int = 0
    splits: dict[str, SplitProgress] = field(default_factory=dict)

    def save(self, staging: Path) -> None:
        """Replace the journal on disk."""
        write_text(staging / _JOURNAL, json.dumps(asdict(self)), durable=True)


@contextmanager
def staging_folder(output: Path, job: dict[str, Any], *, overwrite: bool) -> Iterator[tuple[Path, Journal]]:
    """Open the folder of an unfinished job, or a new one.

    It is gone after success and after a mistake of the user; whatever else ends the process leaves it for the next one.

    Args:
        output: PREFIX.
        job: everything that decides the output.
        overwrite: start afresh where the unfinished job is another one.

    Raises:
        DataError: the folder cannot be made, is in use, or belongs to another job.
    """
    staging = output.with_name(f".{output.name}.partial")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = (staging / _LOCK).open("w")
    except OSError as error:
        raise DataError(f"{output.parent}: cannot be written ({error.strerror}); choose another --output") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{output}: another process is writing it; wait for it or choose another --output"
            ) from None
        journal = _read_journal(staging)
        if journal is None or journal.job != job:
            if journal is not None and not overwrite:
                raise DataError(
                    f"{output}: unfinished output of a command with another {_difference(journal.job, job)}; run that "
                    "one again, or start afresh with --overwrite"
                )
            _empty(staging)
            journal = Journal(job)
            journal.save(staging)
        try:
            yield staging, journal
        except DataError:
            shutil.rmtree(staging)
            raise
        shutil.rmtree(staging)


def output_paths(prefix: Path) -> list[Path]:
    """Every path that a PREFIX can own; PREFIX.json first, because it vouches for the others."""
    suffixes = [".json", "_train.bin", "_train.idx", "_val.bin", "_val.idx", "_tokenizer"]
    return [prefix.with_name(prefix.name + suffix) for suffix in suffixes]


def is_complete(staging: Path, output: Path) -> bool:
    """Whether an earlier process was interrupted while it renamed."""
    return (staging / f"{output.name}.json").exists()


def publish(staging: Path, output: Path) -> None:
    """Rename everything into place, PREFIX.json last; may be repeated after an interruption."""
    splits = read_info(staging / output.name).splits
    vouching, *others = output_paths(output)
    vouching.unlink(missing_ok=True)
    for path in others:
        staged = staging / path.name
        is_split = path.suffix in (".bin", ".idx")
        if staged.exists() or (is_split and path.stem.removeprefix(f"{output.name}_") not in splits):
            _remove(path)
        if staged.exists():
            staged.replace(path)
    (staging / vouching.name).replace(vouching)


def _read_journal(staging: Path) -> Journal | None:
    try:
        content = json.loads((staging / _JOURNAL).read_text(encoding="utf-8"))
        splits = {name: SplitProgress(**split) for name, split in content.pop("splits").items()}
        return Journal(**content, splits=splits)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{staging / _JOURNAL}: damaged ({error}); remove {staging}") from error


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    return next(name for name in {**before, **now} if before.get(name) != now.get(name))


def _empty(staging: Path) -> None:
    for path in staging.iterdir():
        if path.name != _LOCK:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
