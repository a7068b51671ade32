"""Documents of a HuggingFace dataset, streamed once into a JSONL file.

A corpus is read up to three times (count, tokenizer, tokens); a remote one is fetched once and kept until the command
ends.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparsecod_megatron.errors import DataError


def spool_hub_dataset(name: str, text_key: str, max_documents: int | None, path: Path) -> None:
    """Write the texts of one dataset, a JSON object a line.

    Args:
        name: `NAME[:CONFIG]` on the hub, or a directory written by `Dataset.save_to_disk`.
        text_key: column that holds the text.
        max_documents: stop after so many; None reads all.
        path: file to write.

    Raises:
        DataError: no such dataset, column or training split.
    """
    rows = tqdm(itertools.islice(_rows(name), max_documents), desc="fetching", unit=" documents", disable=None)
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            if not isinstance(row.get(text_key), str):
                columns = ", ".join(sorted(row))
                message = f"no text in column {text_key!r} (columns: {columns}); name the right one with --text-key"
                raise DataError(f"hf:{name}: {message}")
            stream.write(json.dumps({text_key: row[text_key]}) + "\n")


def _rows(name: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        if Path(name).is_dir():
            found = datasets.load_from_disk(name)
        else:
            repository, _, config = name.partition(":")
            found = datasets.load_dataset(repository, config or None, streaming=True)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"hf:{name}: cannot be loaded ({error}); check name, configuration and network") from error
    if not isinstance(found, dict):
        return found
    if "train" not in found:
        splits = ", ".join(found)
        raise DataError(f"hf:{name}: no `train` split, only {splits}; save the one you want and give its directory")
    return found["train"]
