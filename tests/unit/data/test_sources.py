from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsecod_megatron.data.sources import TARGET_CHARACTERS, open_corpus
from sparsecod_megatron.errors import DataError

TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
LINES = st.lists(st.sampled_from(["", "\t", "a line of text", "größe 日本", "x" * 9000]), max_size=40)


@given(lines=LINES, end=st.sampled_from(["\n", "\r\n"]))
def test_a_lone_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path_factory, lines, end):
    path = tmp_path_factory.mktemp("lone") / "file.txt"
    text = end.join(["first", *lines, "last"])
    path.write_bytes(text.encode())
    documents = list(open_corpus(str(path)))
    joined = "".join(documents)
    # Only stretches without any text may be missing.
    assert joined.split() == text.split()
    assert all(len(document) <= 2 * TARGET_CHARACTERS + 9002 for document in documents)
    assert all(len(document) >= TARGET_CHARACTERS for document in documents[:-1])
    assert all(document.endswith(("\n", "\r")) for document in documents[:-1])


def test_a_lone_file_prefers_blank_lines(tmp_path):
    paragraph = "word " * 400 + "\n \n"
    path = tmp_path / "file.txt"
    path.write_text(paragraph * 50)
    documents = list(open_corpus(str(path)))
    assert "".join(documents) == paragraph * 50
    assert len(documents) > 4
    assert all(document.endswith("\n \n") for document in documents)


@given(texts=st.lists(TEXT))
def test_lines_and_rows_give_each_text_in_order_however_packed(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("jsonl")
    lines = "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in texts)
    (directory / "a.jsonl").write_text(lines)
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    half = lines.rfind("\n", 0, len(lines) // 2) + 1  # zstd's command line joins files as frames
    frames = [pyarrow.compress(part.encode(), codec="zstd", asbytes=True) for part in (lines[:half], lines[half:])]
    (directory / "c.jsonl.zst").write_bytes(b"".join(frames))
    pyarrow.parquet.write_table(pyarrow.table({"body": pyarrow.array(texts, "string")}), directory / "d.parquet")
    expected = [text for text in texts if text.strip()]
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        corpus = open_corpus(str(directory / name), text_key="body")
        assert list(corpus) == expected
        assert list(corpus) == expected, "a corpus can be read twice"


def test_a_directory_is_read_by_relative_path_and_skips_what_is_not_text(tmp_path):
    files = {"b/z.md": "in b", "a.txt": "line\r\n", "c.jsonl": '{"text": "one"}\n\n{"text": "two"}\n', "b/a.py": "pass"}
    ignored = {"picture.png": "no", ".hidden/x.txt": "no", "b/.x.txt": "no", "empty.txt": " \n"}
    for name, text in {**files, **ignored}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["row"]}), tmp_path / "b" / "b.parquet")
    assert list(open_corpus(str(tmp_path))) == ["line\r\n", "pass", "row", "in b", "one", "two"]
    assert list(open_corpus(str(tmp_path), max_documents=2)) == ["line\r\n", "pass"]


def test_stdlib_is_real_text_and_the_same_each_time():
    first, second = (list(open_corpus("stdlib")) for _ in range(2))
    assert first == second
    assert sum(len(text.encode()) for text in first) > 5_000_000
    import argparse

    assert Path(argparse.__file__).read_text(encoding="utf-8") in first


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "größe".encode("latin-1"), r"latin.txt: not UTF-8 text \(byte 0xf6\)"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999, mtime=0)[:-20], r"cut.jsonl.gz: cannot be read"),
        (
            "cut.jsonl.zst",
            pyarrow.compress(b'{"text": "x"}\n' * 99999, codec="zstd", asbytes=True)[:-9],
            "cut.jsonl.zst: ",
        ),
        ("plain.jsonl.zst", b'{"text": "x"}\n', r"plain.jsonl.zst: cannot be read"),
        ("plain.parquet", b"PAR1 but not really", r"plain.parquet: cannot be read"),
        ("plain.jsonl.gz", b'{"text": "x"}\n', r"plain.jsonl.gz: cannot be read"),
        ("a.jsonl", b'{"text": "x"}\n{"text":\n', r"a.jsonl:2: not JSON"),
        ("a.jsonl", b'["x"]\n', r"a.jsonl:1: a list, not an object"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 3}\n',
            r"a.jsonl:1: no text under key 'text' \(keys: body, id\); .*--text-key",
        ),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: half a surrogate pair"),
    ],
)
def test_damaged_text_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(open_corpus(str(tmp_path / name)))


@pytest.mark.parametrize("column", [{"body": ["x"]}, {"text": [1]}, {"text": ["x", None]}])
def test_a_parquet_file_without_text_is_named(tmp_path, column):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no text under key 'text' \(keys: (body|text)\); .*--text-key"):
        list(open_corpus(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_lone_text_file_may_be_compressed(tmp_path, suffix):
    text = b"some text\r\n" * 9
    packed = {
        ".txt": text,
        ".txt.gz": gzip.compress(text),
        ".txt.zst": pyarrow.compress(text, codec="zstd", asbytes=True),
    }
    (tmp_path / f"file{suffix}").write_bytes(packed[suffix])
    assert list(open_corpus(str(tmp_path / f"file{suffix}"))) == [text.decode()]


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        open_corpus(str(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match=r"no text files in this directory.*\*\.txt"):
        open_corpus(str(tmp_path))
