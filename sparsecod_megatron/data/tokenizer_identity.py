"""Whether token files and a tokenizer belong together: ids of another one look like data and train garbage.

A tokenizer is known by what it does, its entries and its encoding of a text that is hard to split. Its name and the
bytes of its files do not identify it: libraries write the same tokenizer in different ways.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from sparsecod_megatron.data.metadata import split_info
from sparsecod_megatron.data.tokenizer import load_tokenizer
from sparsecod_megatron.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    "The residual stream's variance grows with depth: don't they'll WE'RE 'tis naïve café Größe ﬁne № ½ Ⅷ\n\n\n"
    "  def f(x):\n\treturn x ** 2  # 1234 12345678 3.14e-10 0xFF\r\n    if a!=b&&c||d: {[(<>)]}\n"
    "日本語の文章 中文字符 한국어 русский العربية עברית हिन्दी ไทย e\u0301 \u00a0\u2003\u200b 🎉👩‍🔬 "
    "https://example.org/a_b-c?d=1 supercalifragilistic antidisestablishmentarianism aaaaaaaaaaaaaaaa"
)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of entries with their ids, and of the ids of a text that is hard to split."""
    entries = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps([entries, _probe(tokenizer)]).encode()).hexdigest()


def check_made_with(prefix: str | Path, tokenizer: PreTrainedTokenizerBase, *, owner: str) -> str | None:
    """Check that token files were made with a tokenizer, or with one that it only adds entries to. Local.

    By the digest in PREFIX.json, and by the tokenizer beside it where an earlier version wrote no digest.

    Args:
        prefix: path of the `.bin` and `.idx` files without suffix.
        tokenizer: the model's.
        owner: what it is called in a refusal.

    Returns:
        Why nothing tells which tokenizer the files are of; None where they were checked.

    Raises:
        DataError: they are of another one.
    """
    described = split_info(prefix)
    if described is None:
        return f"{prefix}: no `sparsecod data` metadata beside it, so nothing checks that its tokenizer is {owner}"
    info = described[0]
    if info.tokenizer_digest is not None and info.tokenizer_digest == tokenizer_digest(tokenizer):
        return None
    directory = Path(prefix).parent / info.tokenizer
    own = load_tokenizer(str(directory)) if (directory / "tokenizer.json").is_file() else None
    if own is not None and info.tokenizer_digest not in (None, tokenizer_digest(own)):
        own = None  # the directory has been replaced
    if own is None and info.tokenizer_digest is None:
        return (
            f"{prefix}: metadata of an earlier version and no {directory} beside it, so nothing checks that its "
            f"tokenizer is {owner}"
        )
    difference = "their entries or splits differ" if own is None else _difference(own, tokenizer)
    if difference is None:
        return None
    raise DataError(
        f"{prefix}: made with another tokenizer than {owner}: {difference}; make it again with `sparsecod data "
        "--tokenizer` and that one"
    )


def _difference(own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    ids = other.get_vocab()
    for entry, number in sorted(own.get_vocab().items(), key=lambda item: item[1]):
        if ids.get(entry) != number:
            return f"{entry!r} is {number} there and {ids.get(entry, 'absent')} here"
    for place, (there, here) in enumerate(zip(_probe(own), _probe(other), strict=False)):
        if there != here:
            return f"the same entries, but text is split in another way (token {place} of a probe: {there}, {here})"
    return None if len(_probe(own)) == len(_probe(other)) else "the same entries, but text is split in another way"


def _probe(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer.encode(_PROBE, add_special_tokens=False))
