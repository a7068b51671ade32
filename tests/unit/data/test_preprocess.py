from __future__ import annotations

import dataclasses
import errno
import fcntl
import gzip
import hashlib
import itertools
import json
import os
import random
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from sparsecod_megatron.data.hub import spool_hub_dataset
from sparsecod_megatron.data.metadata import DatasetInfo, SplitInfo, read_info, split_info, write_info
from sparsecod_megatron.data.options import PreprocessOptions
from sparsecod_megatron.data.preprocess import choose_held_out, preprocess
from sparsecod_megatron.errors import DataError
from tests.helpers.cli import FORK_SERVER

DOCUMENTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=60).filter(str.strip), min_size=1, max_size=12)
SLOW = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def decode(prefix: Path, split: str) -> list[str]:
    """The documents of a split, read with Megatron and transformers only; each must end in the end-of-document id."""
    tokenizer = AutoTokenizer.from_pretrained(f"{prefix}_tokenizer")
    tokens = IndexedDataset(f"{prefix}_{split}")
    documents = [tokens[number] for number in range(len(tokens))]
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    assert list(tokens.document_indices) == list(range(len(documents) + 1))
    return [tokenizer.decode(document[:-1]) for document in documents]


def write_jsonl(directory: Path, texts: list[str]) -> Path:
    path = directory / "in.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_gzip(directory: Path, texts: list[str]) -> Path:
    path = write_jsonl(directory, texts)
    zipped = path.with_name("in.jsonl.gz")
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    return zipped


def write_files(directory: Path, texts: list[str]) -> Path:
    folder = directory / "in"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_bytes(text.encode())
    return folder


def write_hub(directory: Path, texts: list[str]) -> str:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(directory / "hub"))
    return f"hf:{directory / 'hub'}"


@SLOW
@pytest.mark.parametrize("write", [write_jsonl, write_gzip, write_files, write_hub])
@given(texts=DOCUMENTS)
def test_token_files_decode_to_the_documents(write, texts):
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        prefix = directory / "out"
        info = preprocess(PreprocessOptions(str(write(directory, texts)), "train:260", prefix)).info
        assert decode(prefix, "train") == texts
        assert info.splits["train"].bytes == sum(len(text.encode()) for text in texts)


@SLOW
@given(texts=DOCUMENTS)
def test_a_lone_text_file_decodes_to_itself(texts):
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "in.txt"
        text = "\n\n".join(text * 300 for text in texts)
        path.write_bytes(text.encode())
        preprocess(PreprocessOptions(str(path), "train:260", Path(name) / "out"))
        assert "".join(decode(Path(name) / "out", "train")).split() == text.split()


def test_stdlib_decodes_to_the_library(tmp_path):
    preprocess(PreprocessOptions("stdlib", "train:300", tmp_path / "out", max_documents=6))
    assert Path(json.__file__).parents[1].joinpath("__future__.py").read_text() in decode(tmp_path / "out", "train")


def test_the_result_is_the_same_for_any_number_of_workers(text_directory, tmp_path, monkeypatch):
    monkeypatch.setattr("sparsecod_megatron.data.encode._CHUNK_DOCUMENTS", 1)  # twelve tasks for three processes
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        output = tmp_path / str(workers) / "out"
        preprocess(PreprocessOptions(str(text_directory), "train:400", output, workers=workers, val_fraction=0.3))
    one, three = (sorted(path for path in (tmp_path / n).rglob("*") if path.is_file()) for n in "13")
    assert [path.name for path in one] == [path.name for path in three]
    assert len(one) == 7
    for left, right in zip(one, three, strict=True):
        assert left.read_bytes() == right.read_bytes(), left.name


def test_every_document_is_in_exactly_one_split(text_directory, tmp_path):
    info = preprocess(PreprocessOptions(str(text_directory), "train:400", tmp_path / "out", val_fraction=0.25)).info
    train, val = decode(tmp_path / "out", "train"), decode(tmp_path / "out", "val")
    everything = [path.read_text(encoding="utf-8") for path in sorted(text_directory.iterdir())]
    assert (len(train), len(val)) == (9, 3)
    assert sorted(train + val) == sorted(everything)
    for name, texts in (("train", train), ("val", val)):
        data = (tmp_path / f"out_{name}.bin").read_bytes()
        split = info.splits[name]
        assert split == SplitInfo(len(texts), len(data) // 2, sum(len(t.encode()) for t in texts), split.sha256)
        assert split.sha256 == hashlib.sha256(data).hexdigest()


@given(count=st.integers(2, 500), fraction=st.floats(0, 0.6), seed=st.integers(0, 9))
def test_the_held_out_share_is_right_seeded_and_never_empty(count, fraction, seed):
    if max(1, round(fraction * count)) >= count:
        return
    chosen = choose_held_out(count, fraction, seed)
    expected = max(1, round(fraction * count)) if fraction else 0
    assert chosen.sum() == expected
    assert np.array_equal(chosen, choose_held_out(count, fraction, seed))


def test_another_seed_holds_out_other_documents():
    assert not np.array_equal(choose_held_out(200, 0.1, 1), choose_held_out(200, 0.1, 2))


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    texts = [f"document {letter} says {letter * 40} " * 5 for letter in "abcdefghijkl"]
    source = write_jsonl(tmp_path, texts)
    preprocess(PreprocessOptions(str(source), "train:400", tmp_path / "out", val_fraction=0.25))
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out_tokenizer").get_vocab()
    for split, learnt in (("train", True), ("val", False)):
        for text in decode(tmp_path / "out", split):
            assert (text.split()[3][:4] in vocabulary) is learnt


def test_metadata_survives_a_round_trip_and_names_what_it_describes(tmp_path):
    split = SplitInfo(1, 2, 3, "abc")
    info = DatasetInfo("x_tokenizer", 300, 0, None, "uint16", {"train": split}, "stdlib", 7)
    write_info(info, tmp_path / "x.json")
    assert read_info(tmp_path / "x") == info
    assert split_info(tmp_path / "x_train") == (info, split)
    assert split_info(tmp_path / "x_val") is None
    assert split_info(tmp_path / "other_train") is None
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(DataError, match=r"x\.json: not written by"):
        read_info(tmp_path / "x")
    with pytest.raises(DataError, match=r"y\.json: no such file"):
        read_info(tmp_path / "y")


def test_overwriting_replaces_the_whole_result(text_directory, tmp_path):
    output = tmp_path / "out"
    preprocess(PreprocessOptions(str(text_directory), "train:300", output, val_fraction=0.3))
    preprocess(PreprocessOptions(str(text_directory), "train:310", output, overwrite=True))
    assert not (tmp_path / "out_val.bin").exists(), "a split of the earlier result must not stay behind"
    assert read_info(output).vocab_size == len(AutoTokenizer.from_pretrained(f"{output}_tokenizer")) == 310


def result_files(output: Path) -> dict[str, bytes]:
    """Content of everything below the output's folder, which must hold nothing else."""
    paths = [path for path in sorted(output.parent.rglob("*")) if path.is_file()]
    return {path.relative_to(output.parent).as_posix(): path.read_bytes() for path in paths}


def interrupt_at_call(monkeypatch, owner: object, name: str, number: int) -> None:
    """Make the `number`-th call of a method, counted from 1, end as Ctrl-C would in the middle of it."""
    original, calls = getattr(owner, name), itertools.count(1)

    def interrupted(*args, **kwargs):
        result = original(*args, **kwargs)
        if next(calls) == number:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)


def count_calls(monkeypatch, owner: object, name: str) -> list[None]:
    """A list that grows by one with every call of a method."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@pytest.mark.parametrize("commit_interval_s", [0.0, 1e9])
def test_an_interrupted_command_goes_on_to_the_same_bytes(text_directory, tmp_path, commit_interval_s):
    """Interrupted at random documents, and at every rename that ends the command."""
    from sparsecod_megatron.data.writer import SplitWriter

    def options(folder: str) -> PreprocessOptions:
        shared = {"val_fraction": 0.25, "commit_interval_s": commit_interval_s}
        return PreprocessOptions(str(text_directory), "train:300", tmp_path / folder / "out", **shared)

    preprocess(options("whole"))
    expected = result_files(tmp_path / "whole" / "out")
    moments = [(SplitWriter, "add", number) for number in random.sample(range(1, 13), 3)]
    moments += [(Path, "replace", -number) for number in range(2, 8)]
    with pytest.MonkeyPatch.context() as monkeypatch:
        renames = count_calls(monkeypatch, Path, "replace")
        preprocess(options("counted"))
    for owner, name, number in moments:
        folder = f"{name}{number}"
        with pytest.MonkeyPatch.context() as monkeypatch:
            interrupt_at_call(monkeypatch, owner, name, number if number > 0 else len(renames) + 1 + number)
            with pytest.raises(KeyboardInterrupt):
                preprocess(options(folder))
        preprocess(options(folder))
        assert result_files(tmp_path / folder / "out") == expected, (name, number)


def alive(process: psutil.Process) -> bool:
    """Whether it runs; an orphan that has ended may stay a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_killed_command_goes_on_to_the_same_bytes(tmp_path):
    """kill -9 at random documents; the next process re-uses what was committed, and no worker outlives its parent."""
    texts = [f"document {number}: " + "the depth of residual streams " * (number % 50) for number in range(60)]
    source = write_jsonl(tmp_path, texts)
    preprocess(PreprocessOptions(str(source), "train:300", tmp_path / "whole" / "out", val_fraction=0.1))
    output = tmp_path / "killed" / "out"
    options = PreprocessOptions(str(source), "train:300", output, val_fraction=0.1, commit_interval_s=0.0)
    journal = output.parent / ".out.partial" / "journal.json"

    def committed() -> int:
        return json.loads(journal.read_text())["documents"] if journal.exists() else 0

    for moment, workers in zip(sorted(random.sample(range(1, 50), 2)), (1, 2), strict=True):
        process = FORK_SERVER.Process(target=preprocess, args=(dataclasses.replace(options, workers=workers),))
        process.start()
        while committed() < moment and process.exitcode is None:
            time.sleep(0.002)
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        before = committed()
        assert moment <= before, "killed while at work"
        deadline = time.monotonic() + 60
        while any(map(alive, children)):
            assert time.monotonic() < deadline, "a worker has outlived its parent"
            time.sleep(0.05)
    result = preprocess(dataclasses.replace(options, commit_interval_s=1e9))
    whole = tmp_path / "whole" / "out"
    assert result_files(output) == result_files(whole)
    assert result.tokens < sum(split.tokens for split in result.info.splits.values()), "nothing was taken over"


def interrupted_output(text_directory, tmp_path, monkeypatch) -> PreprocessOptions:
    """An output that a command left unfinished, and what it was asked for."""
    from sparsecod_megatron.data.writer import SplitWriter

    options = PreprocessOptions(str(text_directory), "train:300", tmp_path / "out", commit_interval_s=0)
    with monkeypatch.context() as patch:
        interrupt_at_call(patch, SplitWriter, "add", 5)
        with pytest.raises(KeyboardInterrupt):
            preprocess(options)
    return options


def test_another_command_does_not_go_on_with_unfinished_output(text_directory, tmp_path, monkeypatch):
    options = interrupted_output(text_directory, tmp_path, monkeypatch)
    with pytest.raises(DataError, match="unfinished output of a command with another tokenizer; run that one again"):
        preprocess(dataclasses.replace(options, tokenizer="train:310"))
    (text_directory / "00.txt").write_text("changed")
    with pytest.raises(DataError, match="with another input files"):
        preprocess(options)
    info = preprocess(dataclasses.replace(options, tokenizer="train:310", overwrite=True)).info
    assert info.vocab_size == 310
    assert decode(tmp_path / "out", "train")[0] == "changed"


def test_two_processes_do_not_write_one_output(text_directory, tmp_path, monkeypatch):
    options = interrupted_output(text_directory, tmp_path, monkeypatch)
    with (tmp_path / ".out.partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="out: another process is writing it"):
            preprocess(options)


def test_a_full_disk_is_one_line_and_can_be_gone_on_with(text_directory, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = PreprocessOptions(str(text_directory), "train:300", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(DataError, match=r"out: No space left on device; fix that and run the same command again"):
            preprocess(options)
    preprocess(options)
    assert len(decode(tmp_path / "out", "train")) == 12


@pytest.mark.parametrize("workers", [1, 2])
def test_max_tokens_ends_with_the_document_that_reaches_it(text_directory, tmp_path, workers):
    preprocess(PreprocessOptions(str(text_directory), "train:300", tmp_path / "all"))
    tokens = IndexedDataset(str(tmp_path / "all_train"))  # its arrays live as long as it does
    limit = int(tokens.sequence_lengths[:4].sum())
    for max_tokens, count in ((limit, 4), (limit + 1, 5), (1, 1), (10**9, 12)):
        output = tmp_path / f"first{max_tokens}-{workers}"
        options = PreprocessOptions(str(text_directory), "train:300", output, workers=workers, max_tokens=max_tokens)
        assert preprocess(options).info.splits["train"].documents == count
        assert decode(output, "train") == decode(tmp_path / "all", "train")[:count]


def test_a_directory_of_data_files_is_a_dataset(tmp_path):
    """Streamed in one pass, and spooled where a tokenizer is learnt first."""
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = [f"text {number} of a dataset" for number in range(9)]
    for part in range(3):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": texts[3 * part : 3 * part + 3]}), folder / f"train-{part}.parquet"
        )
    preprocess(PreprocessOptions(f"hf:{folder}", "train:300", tmp_path / "a"))
    preprocess(PreprocessOptions(f"hf:{folder}", str(tmp_path / "a_tokenizer"), tmp_path / "b", max_documents=7))
    assert decode(tmp_path / "a", "train") == texts
    assert decode(tmp_path / "b", "train") == texts[:7]


def test_an_interrupted_download_goes_on_behind_its_last_whole_line(tmp_path):
    texts = [f"text {number}" for number in range(9)]
    name = write_hub(tmp_path, texts).removeprefix("hf:")
    spool_hub_dataset(name, "text", None, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    for size in random.sample(range(len(whole)), 4):
        (tmp_path / "cut.jsonl").write_bytes(whole[:size])
        spool_hub_dataset(name, "text", None, tmp_path / "cut.jsonl")
        assert (tmp_path / "cut.jsonl").read_bytes() == whole
