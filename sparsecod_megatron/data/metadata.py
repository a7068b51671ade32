"""PREFIX.json: what `sparsecod data` wrote, so that training and evaluation need not be told again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from sparsecod_megatron.errors import DataError


@dataclass(frozen=True)
class SplitInfo:
    """Size of one split. `bytes` are those of the UTF-8 text, `sha256` is of the `.bin` file."""

    documents: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """Contents of PREFIX.json.

    Attributes:
        tokenizer: directory relative to the file.
        vocab_size: rows that its ids need.
        eod_token_id: ends each document.
        bos_token_id: None if the tokenizer has none.
        dtype: number format of the stored ids.
        splits: keyed `train` and `val`.
        input: what `sparsecod data` was given.
        seed: chose the documents held out.
        tokenizer_digest: `tokenizer_digest` of the tokenizer; None where an earlier version wrote the file.
    """

    tokenizer: str
    vocab_size: int
    eod_token_id: int
    bos_token_id: int | None
    dtype: str
    splits: dict[str, SplitInfo]
    input: str
    seed: int
    tokenizer_digest: str | None = None


def write_info(info: DatasetInfo, path: Path) -> None:
    """Write PREFIX.json."""
    path.write_text(json.dumps(asdict(info), indent=2) + "\n", encoding="utf-8")


def read_info(prefix: str | Path) -> DatasetInfo:
    """Read PREFIX.json.

    Args:
        prefix: PREFIX given to `sparsecod data --output`.

    Raises:
        DataError: missing, or not what `sparsecod data` writes.
    """
    path = Path(f"{prefix}.json")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["splits"] = {name: SplitInfo(**split) for name, split in fields["splits"].items()}
        return DatasetInfo(**fields)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; make the data set with `sparsecod data --output {prefix}`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not written by `sparsecod data` or damaged ({error}); make it again") from error


def split_info(token_prefix: str | Path) -> tuple[DatasetInfo, SplitInfo] | None:
    """Metadata of one pair of token files.

    Args:
        token_prefix: path of the `.bin` and `.idx` files without suffix, such as PREFIX_train.

    Returns:
        The data set's and the split's information; None for token files made by something else.
    """
    prefix, _, split = str(token_prefix).rpartition("_")
    if not Path(f"{prefix}.json").is_file():
        return None
    info = read_info(prefix)
    return (info, info.splits[split]) if split in info.splits else None
