from __future__ import annotations

import base64
import json

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sparsecod_megatron.data.encode import load_encoding_tokenizer
from sparsecod_megatron.data.tiktoken import _PATTERNS
from sparsecod_megatron.data.tokenizer import load_tokenizer, save_tokenizer
from sparsecod_megatron.errors import DataError

# Bytes, then unions of earlier ones; "abc" is reachable only through "ab", " the" only through " t" and "he".
LEARNT = [
    b"th",
    b"he",
    b" t",
    b" the",
    b"ab",
    b"bc",
    b"abc",
    b"12",
    b"123",
    b"\n\n",
    b"\xc3\xb6",
    b"'s",
    b"  ",
    b"    ",
]
RANKS = {**{bytes([byte]): byte for byte in range(256)}, **{token: 256 + n for n, token in enumerate(LEARNT)}}


def write_ranks(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return str(path)


def join_by_rank(stretch: bytes, ranks) -> list[int]:
    """What the ranks mean, in the words of their definition."""
    if stretch in ranks:
        return [ranks[stretch]]
    parts = [bytes([byte]) for byte in stretch]
    while unions := [(ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks]:  # noqa: B905
        _, place = min(unions)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [ranks[part] for part in parts]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """One tokenizer file an encoding."""
    folder = tmp_path_factory.mktemp("ranks")
    names = ("gpt2", "cl100k", "qwen", "o200k")
    paths = {name: write_ranks(folder / f"{name}_base.tiktoken", RANKS) for name in names}
    files = {name: save_tokenizer(load_tokenizer(path), folder / name) for name, path in paths.items()}
    return {name: load_encoding_tokenizer(file) for name, file in files.items()}


@given(
    text=st.one_of(
        st.text(st.sampled_from("thea bc123\n'sö    X,/")),
        st.text(st.characters(codec="utf-8"), max_size=30),
    ),
    name=st.sampled_from(["gpt2", "cl100k", "qwen", "o200k"]),
)
def test_ids_are_those_of_joining_by_rank(converted, text, name):
    stretches = regex.findall(_PATTERNS[name], text)
    expected = [rank for stretch in stretches for rank in join_by_rank(stretch.encode(), RANKS)]
    assert converted[name].encode(text, add_special_tokens=False).ids == expected
    assert converted[name].decode(expected, skip_special_tokens=False) == text


def test_the_end_of_text_is_the_first_id_behind_the_ranks(tmp_path):
    tokenizer = load_tokenizer(write_ranks(tmp_path / "cl100k.tiktoken", RANKS))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|endoftext|>", len(RANKS))


def test_gpt2_as_ranks_gives_gpt2s_ids(shared_data, tmp_path):
    """OpenAI published GPT-2 as merges; its ranks are the same vocabulary in the same order."""
    vocabulary = json.loads((shared_data / "tokenizers" / "gpt2_vocab.json").read_text())
    merges = str(shared_data / "tokenizers" / "gpt2_merges.txt")
    reference = Tokenizer(models.BPE.from_file(str(shared_data / "tokenizers" / "gpt2_vocab.json"), merges))
    reference.pre_tokenizer, reference.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = {letter: byte for byte, letter in _letters().items()}
    ranks = {bytes(letters[x] for x in token): rank for token, rank in vocabulary.items() if token != "<|endoftext|>"}
    tokenizer = load_tokenizer(write_ranks(tmp_path / "gpt2.tiktoken", ranks))
    text = (shared_data / "text" / "wikitext2_test.txt").read_text(encoding="utf-8")[:200_000] + "naïve 日本 🎉\n\n\tx"
    assert tokenizer.encode(text) == reference.encode(text).ids
    assert tokenizer.eos_token_id == vocabulary["<|endoftext|>"]


def _letters():
    """ByteLevel's alphabet, asked of the library: it spells byte 0xXX of Latin-1's second half as UTF-8 does."""
    found = {}
    for code in range(256):
        encoded = chr(code).encode()
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(code))[0][0]
        found.update(zip(encoded, spelled, strict=True))
    for code in range(0x100, 0x110000, 0x40):  # lead bytes of longer characters
        if not 0xD800 <= code < 0xE000:
            encoded = chr(code).encode()
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            found.update(zip(encoded, level.pre_tokenize_str(chr(code))[0][0], strict=True))
    return {byte: found.get(byte, chr(byte)) for byte in range(256)}  # the others never occur in UTF-8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "mine.tiktoken",
            b"",
            "mine.tiktoken: the name does not tell the encoding; begin it with one of gpt2",
        ),
        ("gpt2.tiktoken", b"AA== 0\nxx\n", r"gpt2.tiktoken:2: not `base64 rank`"),
        ("gpt2.tiktoken", b"AA== zero\n", r"gpt2.tiktoken:1: not `base64 rank`"),
        ("gpt2.tiktoken", b"AA== 0\n", r"gpt2.tiktoken: no rank for byte 0x01"),
    ],
)
def test_damaged_ranks_are_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(tmp_path / name))


def test_a_rank_given_twice_is_refused(tmp_path):
    with pytest.raises(DataError, match="a rank is negative or given twice"):
        load_tokenizer(write_ranks(tmp_path / "gpt2.tiktoken", {**RANKS, b"ab": 3}))
