from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from sparsecod_megatron.data.index_file import TokenFiles, check_entries, token_documents, token_dtype, write_index
from sparsecod_megatron.data.integrity import check_token_files, check_vocabulary
from sparsecod_megatron.data.metadata import DatasetInfo, SplitInfo, write_info
from sparsecod_megatron.errors import DataError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_whole_files_pass_and_are_counted(write_tokens, dtype):
    assert check_token_files(write_tokens(DOCUMENTS, dtype=dtype), 11) == TokenFiles(3, 12, dtype)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_missing_file_is_named(write_tokens, suffix):
    prefix = write_tokens(DOCUMENTS)
    Path(prefix + suffix).unlink()
    with pytest.raises(DataError, match=rf"tokens\{suffix}: no such file"):
        check_token_files(prefix, 4)


@pytest.mark.parametrize("lost", [1, 2, 23])
def test_a_truncated_bin_is_named_with_both_sizes(write_tokens, lost):
    prefix = write_tokens(DOCUMENTS)
    whole = Path(prefix + ".bin").read_bytes()
    Path(prefix + ".bin").write_bytes(whole[:-lost])
    with pytest.raises(DataError, match=rf"tokens\.bin: {24 - lost} bytes, but its \.idx file says 24"):
        check_token_files(prefix, 4)


def test_a_bin_with_too_much_in_it_is_refused(write_tokens):
    prefix = write_tokens(DOCUMENTS)
    with Path(prefix + ".bin").open("ab") as stream:
        stream.write(b"xx")
    with pytest.raises(DataError, match="26 bytes"):
        check_token_files(prefix, 4)


def test_every_truncation_of_the_index_is_refused(write_tokens):
    prefix = write_tokens(DOCUMENTS)
    whole = Path(prefix + ".idx").read_bytes()
    for size in range(len(whole)):
        Path(prefix + ".idx").write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"tokens\.idx: "):
            check_token_files(prefix, 4)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + b"\0" * 90, b"MMIDIDX\x00\x00" + b"\x07" * 90])
def test_a_foreign_index_is_refused(write_tokens, content):
    prefix = write_tokens(DOCUMENTS)
    Path(prefix + ".idx").write_bytes(content)
    with pytest.raises(DataError, match=r"tokens\.idx: (not a Megatron index file|index version)"):
        check_token_files(prefix, 4)


def test_no_documents_are_refused(write_tokens):
    with pytest.raises(DataError, match="no documents"):
        check_token_files(write_tokens([]), 4)


def test_fewer_tokens_than_a_sample_are_refused(write_tokens):
    with pytest.raises(DataError, match=r"12 tokens, fewer than one sample of 12 \+ 1"):
        check_token_files(write_tokens(DOCUMENTS), 12)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_token_files_of_others_are_scanned_for_the_largest_id(write_tokens, dtype):
    prefix = write_tokens(DOCUMENTS, dtype=dtype)
    check_vocabulary(prefix, 14)
    with pytest.raises(DataError, match=r"largest token id is 13, but the model's vocabulary has 13 .* at least 14"):
        check_vocabulary(prefix, 13)


def test_scanning_covers_every_chunk(write_tokens, monkeypatch):
    monkeypatch.setattr("sparsecod_megatron.data.integrity._SCAN_TOKENS", 5)
    for place in range(12):
        tokens = [1] * 12
        tokens[place] = 99
        with pytest.raises(DataError, match="largest token id is 99"):
            check_vocabulary(write_tokens([tokens]), 50)


def test_the_tokenizer_decides_where_it_is_known(write_tokens, tmp_path):
    prefix = write_tokens(DOCUMENTS, name="x_train")
    for tokens, largest in ((12, 299), (11, 13)):  # a count that differs describes other files: scan
        split = SplitInfo(documents=3, tokens=tokens, bytes=1, sha256="")
        info = DatasetInfo("x_tokenizer", 300, 0, None, "uint16", {"train": split}, "x", 1)
        write_info(info, tmp_path / "x.json")
        check_vocabulary(prefix, largest + 1)
        with pytest.raises(DataError, match=f"largest (token )?id is {largest}"):
            check_vocabulary(prefix, largest)


LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(lengths=LENGTHS, dtype=st.sampled_from([np.uint16, np.int32]), chunk=st.integers(1, 9))
def test_the_index_is_the_one_that_megatron_writes(tmp_path_factory, lengths, dtype, chunk):
    folder = tmp_path_factory.mktemp("index")
    builder = IndexedDatasetBuilder(str(folder / "theirs.bin"), dtype=dtype)
    for length in lengths:
        builder.add_document(np.ones(length, dtype=dtype), [length])
    builder.finalize(str(folder / "theirs.idx"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("sparsecod_megatron.data.index_file._CHUNK", chunk)
        write_index(folder / "ours.idx", np.array(lengths, dtype=np.int32), dtype)
        check_entries(folder / "ours.idx")
    assert (folder / "ours.idx").read_bytes() == (folder / "theirs.idx").read_bytes()


@given(documents=st.lists(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=3), min_size=1, max_size=6))
def test_documents_are_those_that_megatron_reads(tmp_path_factory, documents):
    """Of any number of sequences, none among them; those without a token are left out."""
    if not any(map(any, documents)):
        return
    prefix = tmp_path_factory.mktemp("documents") / "tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for sequences in documents:
        for sequence in sequences:
            builder.add_item(torch.tensor(sequence, dtype=torch.int32))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    check_entries(prefix.with_suffix(".idx"))
    whole = [[token for sequence in sequences for token in sequence] for sequences in documents]
    assert [document.tolist() for document in token_documents(prefix)] == [document for document in whole if document]


def test_ids_are_stored_in_megatrons_type():
    for size in (1, 65499, 65500, 1 << 20):
        assert token_dtype(size) is DType.optimal_dtype(size)


@settings(max_examples=300)
@given(flips=st.lists(st.integers(0, 8 * (34 + 12 * 3 + 8 * 4) - 1), min_size=1, max_size=6, unique=True))
def test_flipped_bits_of_the_index_are_one_line_or_harmless(tmp_path_factory, flips):
    prefix = tmp_path_factory.getbasetemp() / "flipped"
    lengths = [len(document) for document in DOCUMENTS]
    write_index(prefix.with_suffix(".idx"), np.array(lengths, dtype=np.int32), np.uint16)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(DOCUMENTS).astype(np.uint16).tobytes())
    content = bytearray(prefix.with_suffix(".idx").read_bytes())
    for bit in flips:
        content[bit // 8] ^= 1 << (bit % 8)
    prefix.with_suffix(".idx").write_bytes(content)
    try:
        check_token_files(prefix, 4)
    except DataError as error:
        assert "\n" not in str(error)
    else:  # only ends of documents may differ, and only so that each is still an end of a sequence
        tokens = IndexedDataset(str(prefix))
        assert [tokens[number].tolist() for number in range(len(tokens))] == DOCUMENTS
        assert all(0 <= end <= 3 for end in tokens.document_indices)


@settings(max_examples=100)
@given(content=st.binary(max_size=200), whole_header=st.booleans())
def test_any_bytes_are_refused_in_one_line(tmp_path_factory, content, whole_header):
    prefix = tmp_path_factory.getbasetemp() / "random"
    header = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" if whole_header else b""
    prefix.with_suffix(".idx").write_bytes(header + content)
    prefix.with_suffix(".bin").write_bytes(b"xxxxxxxx")
    with pytest.raises(DataError, match=r"^[^\n]*random\.(idx|bin): [^\n]*$"):
        check_token_files(prefix, 1)
