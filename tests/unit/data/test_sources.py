from __future__ import annotations

import codecs
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


def pack(content: bytes, suffix: str) -> bytes:
    """Content of a file with a suffix of a compressed one, or without."""
    if suffix == ".gz":
        return gzip.compress(content)
    return pyarrow.compress(content, codec="zstd", asbytes=True) if suffix == ".zst" else content


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
        ("a.jsonl", b'"x"\n', r"a.jsonl:1: a str, not an object"),
        ("a.jsonl", b'["x"]\n', r"a.jsonl: item 1: a str, not an object"),
        ("a.json", b'[{"text": "x"}, {"text": ]', r"a.json: item 2: not JSON"),
        ("a.json", b'[{"text": "x"}', r"a.json: item 1: not JSON"),
        ("a.json", b'[{"text": "x"}] [', r"a.json: '\[' after its array"),
        ("a.json", b'{\n"text": "x"}', r"a.json:1: not JSON"),
        ("a.jsonl", b'{"text": null}\n', r"a.jsonl:1: null under key 'text', not text; remove the record"),
        ("a.jsonl", b'{"text": 3}\n', r"a.jsonl:1: a number under key 'text', not text; name another"),
        ("utf16.txt", "some text of the West".encode("utf-16-le"), "utf16.txt: looks like UTF-16 without"),
        ("cut.txt", "größe".encode("utf-16")[:-1], "cut.txt: not the UTF-16-LE text that its byte-order mark says"),
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


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": ["x"]}, r"no text under key 'text' \(keys: body\); .*--text-key"),
        ({"text": [1]}, "column 'text' holds int64, not text"),
        ({"text": ["x", None]}, "row 2: null under key 'text'"),
    ],
)
def test_a_parquet_file_without_text_is_named(tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table(column), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet: {message}"):
        list(open_corpus(str(tmp_path / "a.parquet")))


def test_text_that_parquet_holds_in_a_dictionary_is_text(tmp_path):
    texts = ["one", "two", "one"]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array(texts).dictionary_encode()}), tmp_path / "a.parquet"
    )
    assert list(open_corpus(str(tmp_path / "a.parquet"))) == texts


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", ["m.json", "m.ndjson", "m.jsonlines", "m.JSONL", "m", "m.data"])
def test_json_is_never_read_as_text(tmp_path, name, suffix):
    """Lines and an array, whatever the name: three documents, and no brace among them."""
    texts = ["alpha beta", "gamma", 'quote " and\u2028{"text": 1}']
    lines = "\n \n" + "".join(json.dumps({"id": [1], "text": text}) + "\r\n" for text in texts)
    array = json.dumps([{"text": text} for text in texts], indent=1)
    for content in (
        lines,
        array,
        "\n" + array.replace("\n", ""),
        lines.encode("utf-16"),
        codecs.BOM_UTF8 + array.encode(),
    ):
        packed = pack(content.encode() if isinstance(content, str) else content, suffix.lower())
        (tmp_path / f"{name}{suffix}").write_bytes(packed)
        assert list(open_corpus(str(tmp_path / f"{name}{suffix}"))) == texts


@given(texts=st.lists(TEXT), block=st.integers(1, 40), indent=st.sampled_from([None, 0, 2]))
def test_an_array_is_its_items_however_its_blocks_fall(tmp_path_factory, texts, block, indent):
    path = tmp_path_factory.getbasetemp() / "array.json"
    path.write_text(json.dumps([{"n": 12.5, "text": text, "more": [{}]} for text in texts], indent=indent))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sparsecod_megatron.data.json_documents._BLOCK", block)
        assert list(open_corpus(str(path))) == [text for text in texts if text.strip()]


def test_text_by_name_that_looks_like_json_is_text_with_a_word(tmp_path, caplog):
    (tmp_path / "a.txt").write_text('{"text": "alpha"}\n')
    assert list(open_corpus(str(tmp_path / "a.txt"))) == ['{"text": "alpha"}\n']
    assert "a.txt: read as text, because of its name, but it begins with JSON" in caplog.text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("größe\r\n日本".encode(encoding))
    assert list(open_corpus(str(tmp_path / "a.txt"))) == list(open_corpus(str(tmp_path))) == ["größe\r\n日本"]


def test_marks_between_joined_files_of_lines_are_no_json(tmp_path):
    (tmp_path / "a.jsonl").write_bytes((codecs.BOM_UTF8 + b'{"text": "x"}\n') * 2)
    assert list(open_corpus(str(tmp_path / "a.jsonl"))) == ["x", "x"]


def test_a_directory_leaves_nothing_out_without_a_word(tmp_path, caplog):
    """Packed text, upper case, links to folders (each read once, cycles too); the rest is counted and named."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "sub", root / ".git", elsewhere):
        folder.mkdir(parents=True)
    for name, suffix in (
        ("a.txt.gz", ".gz"),
        ("b.md.zst", ".zst"),
        ("c.TXT", ""),
        ("sub/d.Rst", ""),
        ("e.JSON.GZ", ".gz"),
    ):
        text = json.dumps([{"text": name}]) if "JSON" in name else name
        (root / name).write_bytes(pack(text.encode(), suffix))
    (elsewhere / "f.txt").write_text("f")
    (root / "link").symlink_to(elsewhere)
    (root / "sub" / "cycle").symlink_to(root)
    (elsewhere / "cycle").symlink_to(elsewhere)
    (root / "nothing.txt").symlink_to("absent")
    for name in ("picture.png", ".hidden.txt", "package.json", ".git/x.txt"):
        (root / name).write_text('{"name": "x"}')
    assert list(open_corpus(str(root))) == ["a.txt.gz", "b.md.zst", "c.TXT", "e.JSON.GZ", "f", "sub/d.Rst"]
    left_out = ".git/, .hidden.txt, link/cycle/, nothing.txt, package.json and 2 more"
    assert caplog.messages == [f"{root}: 6 files are read, 7 entries are not: {left_out}"]
    caplog.clear()
    for name in ("picture.png", ".hidden.txt", "package.json", ".git/x.txt", "nothing.txt", "sub/cycle", "link"):
        (root / name).unlink()
    (root / ".git").rmdir()
    assert len(list(open_corpus(str(root)))) == 5
    assert not caplog.messages, "nothing was left out"


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".txt.zst"])
def test_a_lone_text_file_may_be_compressed(tmp_path, suffix):
    text = b"some text\r\n" * 9
    (tmp_path / f"file{suffix}").write_bytes(pack(text, suffix.removeprefix(".txt")))
    assert list(open_corpus(str(tmp_path / f"file{suffix}"))) == [text.decode()]


def test_nothing_to_read_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file or directory"):
        open_corpus(str(tmp_path / "absent.txt"))
    with pytest.raises(DataError, match=r"no text files in this directory.*\*\.txt"):
        open_corpus(str(tmp_path))
