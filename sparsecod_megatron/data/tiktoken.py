"""A `.tiktoken` file of ranks as a `tokenizers.Tokenizer` with the same ids.

The file lists byte strings in the order they were learnt, `base64 rank` a line. Within each stretch that a regular
expression cuts off, tiktoken joins the neighbours whose union has the lowest rank. A BPE with merges does the same once
the two halves of each string are known: they are what it comes apart into when only lower ranks may be joined.

The regular expression is not in the file, so that the file's name has to tell it.

Source: github.com/openai/tiktoken, `tiktoken_ext/openai_public.py` (expressions) and `src/lib.rs` (the joining).
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from sparsecod_megatron.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    "gpt2": _GPT2,
    "r50k": _GPT2,
    "p50k": _GPT2,
    "cl100k": _CL100K,
    "llama3": _CL100K,
    "qwen": _CL100K.replace("{1,3}", ""),
    "o200k": _O200K,
}


def convert_tiktoken(path: Path) -> Tokenizer:
    """Convert a file of ranks; `<|endoftext|>` gets the first id behind them.

    Args:
        path: named after its encoding, such as `cl100k_base.tiktoken`.

    Raises:
        DataError: damaged, without one of the 256 bytes, or of an unknown encoding.
    """
    pattern = next((pattern for name, pattern in _PATTERNS.items() if name in path.name.lower()), None)
    if pattern is None:
        known = ", ".join(_PATTERNS)
        raise DataError(f"{path}: the name does not tell the encoding; begin it with one of {known}")
    ranks = _read_ranks(path)
    letters = _byte_letters()
    spell = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(spell[left], spell[right]) for token in ranks for left, right in _halves(token, ranks)]
    vocabulary = {spell[token]: rank for token, rank in ranks.items()}
    vocabulary[END_OF_TEXT] = max(ranks.values()) + 1
    # A stretch that is a token is taken whole, even where merges would not lead to it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False, special=True)])
    return tokenizer


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Byte strings by rank, the lowest first."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path}:{number}: not `base64 rank`; it is damaged or not a .tiktoken file") from None
    missing = next((byte for byte in range(256) if bytes([byte]) not in ranks), None)
    if missing is not None:
        raise DataError(f"{path}: no rank for byte 0x{missing:02x}; it is damaged or not a .tiktoken file")
    if len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0:
        raise DataError(f"{path}: a rank is negative or given twice; it is damaged")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The two strings that a string was joined from; none for a byte, or for one that is only ever taken whole."""
    parts = [token[place : place + 1] for place in range(len(token))]
    never = ranks[token]
    while len(parts) > 2:
        unions = [ranks.get(left + right, never) for left, right in zip(parts, parts[1:], strict=False)]
        lowest = min(unions)
        if lowest >= never:
            return []
        place = unions.index(lowest)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [(parts[0], parts[1])] if len(parts) == 2 else []


def _byte_letters() -> dict[int, str]:
    """The printable letter that `ByteLevel` writes for each byte: itself where it is one, else one from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return {byte: chr(byte) if byte in printable else chr(next(others)) for byte in range(256)}
