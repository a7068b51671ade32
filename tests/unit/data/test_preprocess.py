from __future__ import annotations

import gzip
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset
from transformers import AutoTokenizer

from sparsecod_megatron.data.metadata import DatasetInfo, SplitInfo, read_info, split_info, write_info
from sparsecod_megatron.data.preprocess import PreprocessOptions, choose_held_out, preprocess
from sparsecod_megatron.errors import DataError

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
        info = preprocess(PreprocessOptions(str(write(directory, texts)), "train:260", prefix))
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
    info = preprocess(PreprocessOptions(str(text_directory), "train:400", tmp_path / "out", val_fraction=0.25))
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


def test_an_interruption_leaves_nothing(text_directory, tmp_path, monkeypatch):
    from sparsecod_megatron.data.writer import SplitWriter

    output = tmp_path / "results" / "out"
    add = SplitWriter.add

    def interrupted(self, tokens, num_bytes):
        add(self, tokens, num_bytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(SplitWriter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess(PreprocessOptions(str(text_directory), "train:300", output, workers=2))
    assert list(output.parent.iterdir()) == []
