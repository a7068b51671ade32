from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from sparsecod_megatron.cli.main import main

GOOD = ["--tokenizer", "train:300", "--workers", "1"]


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": f"document {n}", "id": n}) + "\n" for n in range(9)))
    return path


def refused(capsys, arguments, output) -> str:
    """Run the command; it must fail with one line on stderr and leave nothing beside the output."""
    before = sorted(output.parent.iterdir()) if output.parent.exists() else []
    assert main(["data", "--output", str(output), *arguments]) == 2
    after = sorted(output.parent.iterdir()) if output.parent.exists() else []
    assert after == before
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokenizer", "train:lots"], "'lots' is not a vocabulary size"),
        (["--tokenizer", "train:100"], "train:100: too small"),
        (["--tokenizer", "missing.json"], "missing.json: no such tokenizer file"),
        (["--text-key", "body"], "in.jsonl:1: no text under key 'body' (keys: id, text)"),
        (["--val-fraction", "1.5"], "--val-fraction 1.5: must be"),
        (["--val-fraction", "0.99"], "holding out 9 of 9 documents leaves none"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--max-documents", "0"], "--max-documents 0: must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (["--seed", "-1"], "--seed -1: must be at least 0"),
        (["--output", ".."], "--output ..: must end in a name"),
        (["--tokenizer", "x\udcff"], "--tokenizer 'x\\udcff': not a UTF-8 name"),
        (["--max-tokens", "1", "--val-fraction", "0.3"], "--max-tokens 1: reached before any document of val"),
        (["--input", "missing.txt"], "missing.txt: no such file or directory"),
        (["--input", "hf:missing/dataset"], "hf:missing/dataset: cannot be loaded"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, source, tmp_path, arguments, message):
    assert message in refused(capsys, ["--input", str(source), *GOOD, *arguments], tmp_path / "out")


@pytest.mark.parametrize("number", ["inf", "nan", "1.5", "many", "1e-3"])
def test_a_number_of_tokens_is_whole(capsys, source, tmp_path, number):
    with pytest.raises(SystemExit) as stop:
        main(["data", "--input", str(source), *GOOD, "--output", str(tmp_path / "out"), "--max-tokens", number])
    assert stop.value.code == 2
    assert f"--max-tokens: '{number}' is not a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("name", [b"in\xff.txt", b"in\xff.txt.zst", b"in\xff.parquet", b"in\xff"])
def test_a_name_need_not_be_utf8(capsys, tmp_path, name):
    """As input it is read, in a message it is printed, as output it is refused: tokenizers cannot open it."""
    path = tmp_path / os.fsdecode(name)
    if name.endswith(b"parquet"):
        with path.open("wb") as stream:
            pyarrow.parquet.write_table(pyarrow.table({"text": ["some text"]}), stream)
    elif name.endswith(b"xff"):
        path.mkdir()
        (path / os.fsdecode(b"\xfe.txt")).write_text("some text")
        (path / os.fsdecode(b"\xfe.png")).write_text("no")
    else:
        path.write_bytes(pyarrow.compress(b"some text", "zstd", asbytes=True) if b"zst" in name else b"some text")
    arguments = ["--input", str(path), *GOOD]
    assert main(["data", *arguments, "--output", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["splits"]["train"]["bytes"] == len("some text")
    capsys.readouterr()
    assert "not a UTF-8 name" in refused(capsys, arguments, tmp_path / os.fsdecode(b"\xff"))


def test_damage_found_midway_leaves_nothing(capsys, source, tmp_path):
    with source.open("a") as stream:
        stream.write('{"text": 3}\n')
    line = refused(capsys, ["--input", str(source), *GOOD], tmp_path / "results" / "out")
    assert "in.jsonl:10: a number under key 'text'" in line


def test_text_without_documents_is_refused(capsys, tmp_path):
    (tmp_path / "in.txt").write_text(" \n\n")
    assert "no documents with text" in refused(capsys, ["--input", str(tmp_path / "in.txt"), *GOOD], tmp_path / "out")


def test_an_earlier_result_is_kept_unless_told_otherwise(capsys, source, tmp_path):
    arguments = ["--input", str(source), *GOOD]
    assert main(["data", *arguments, "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert "exists already; choose another --output or add --overwrite" in refused(capsys, arguments, tmp_path / "out")
    assert main(["data", *arguments, "--output", str(tmp_path / "out"), "--overwrite"]) == 0


def test_throughput_is_printed(capsys, source, tmp_path):
    assert main(["data", "--input", str(source), *GOOD, "--output", str(tmp_path / "out"), "--max-tokens", "1e6"]) == 0
    assert re.search(r"s of tokenizing with 1 processes: [\d,]+ tokens/s, [\d.]+ MB/s", capsys.readouterr().out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_refused(capsys, source, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot be written" in refused(capsys, ["--input", str(source), *GOOD], tmp_path / "locked" / "out")


def test_an_output_below_a_file_is_refused(capsys, source):
    assert main(["data", "--input", str(source), *GOOD, "--output", str(source / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_help_imports_nothing_heavy():
    program = (
        "import sys; from sparsecod_megatron.cli import data; import argparse;"
        "data.add_arguments(argparse.ArgumentParser());"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'tokenizers', 'numpy', 'megatron')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_megatrons_script_writes_the_same_tokens(source, tmp_path, repo_root):
    assert main(["data", "--input", str(source), *GOOD, "--output", str(tmp_path / "ours")]) == 0
    script = [sys.executable, "-W", "ignore", str(repo_root / "tools" / "preprocess_data.py")]
    options = [
        "--input",
        str(source),
        "--output-prefix",
        str(tmp_path / "theirs"),
        "--append-eod",
        "--json-keys",
        "text",
    ]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path / "ours_tokenizer")]
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    subprocess.run([*script, *options, *tokenizer, "--workers", "2"], check=True, env=environment)
    for suffix in ("_train.bin", "_train.idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()
