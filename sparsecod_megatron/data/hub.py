"""Documents of a HuggingFace dataset, streamed.

One pass reads the stream itself, so that `--max-tokens` ends the download. A corpus that is read more than once is
first fetched into a JSONL file, from which an interrupted command resumes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparsecod_megatron.data.readers import no_text_key, no_text_value
from sparsecod_megatron.data.sources import Corpus
from sparsecod_megatron.errors import DataError, first_line

_MARKER_FILES = ("dataset_info.json", "dataset_dict.json")


def open_hub_dataset(name: str, text_key: str, max_documents: int | None) -> Corpus:
    """The documents of one dataset, fetched again in each pass.

    Args:
        name: `NAME[:CONFIG]` on the hub, a directory of data files, or one written by `Dataset.save_to_disk`.
        text_key: column that holds the text.
        max_documents: keep only this many, the first ones; None keeps all.

    Raises:
        DataError: while iterating: no such dataset, column or training split.
    """
    folder = Path(name.partition(":")[0])
    files = tuple(sorted(path for path in folder.rglob("*") if path.is_file())) if folder.is_dir() else ()
    return Corpus(lambda: _texts(name, text_key, 0), max_documents, files)


def spool_hub_dataset(name: str, text_key: str, max_documents: int | None, path: Path) -> None:
    """Write the texts of one dataset, one JSON object per line; resumes after the lines that are there.

    Args:
        name: as `open_hub_dataset`.
        text_key: column that holds the text.
        max_documents: stop after this many; None reads all.
        path: file to write.

    Raises:
        DataError: no such dataset, column or training split.
    """
    with path.open("ab+") as stream, tqdm(desc="fetching", unit=" documents", disable=None) as progress:
        rows = documents = 0
        stream.seek(0)
        end = 0
        for line in stream:
            if line.endswith(b"\n"):  # else a killed process left it half-written
                end += len(line)
                rows += 1
                documents += bool(json.loads(line)[text_key].strip())
        stream.truncate(end)
        progress.update(documents)
        texts = _texts(name, text_key, rows)
        while max_documents is None or documents < max_documents:
            text = next(texts, None)
            if text is None:
                break
            stream.write(json.dumps({text_key: text}).encode() + b"\n")
            documents += bool(text.strip())
            progress.update()


def _texts(name: str, text_key: str, start: int) -> Iterator[str]:
    import datasets

    try:
        for row in _rows(name, start):
            if text_key not in row:
                raise no_text_key(f"hf:{name}", text_key, list(row))
            if not isinstance(row[text_key], str):
                raise no_text_value(f"hf:{name}", text_key, row[text_key])
            yield row[text_key]
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hf:{name}: cannot be loaded ({first_line(error)}); check name, configuration and network"
        ) from error


def _rows(name: str, start: int) -> Iterable[dict[str, Any]]:
    import datasets

    repository, _, config = name.partition(":")
    if any((Path(repository) / marker).is_file() for marker in _MARKER_FILES):
        found = datasets.load_from_disk(repository)
    else:
        found = datasets.load_dataset(repository, config or None, streaming=True)
    if isinstance(found, dict):
        if "train" not in found:
            splits = ", ".join(found)
            raise DataError(f"hf:{name}: no `train` split, only {splits}; save the one you want and give its directory")
        found = found["train"]
    return found.skip(start) if start else found
