from __future__ import annotations

import pytest

from sparsecod_megatron.config.blend import Blend
from sparsecod_megatron.data.fingerprint import check_fingerprint, fingerprint
from sparsecod_megatron.errors import DataError

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 13, 0]]


def taken(blend, seq_length=4, seed=1):
    return fingerprint(blend, seq_length=seq_length, seed=seed)


def test_the_same_content_elsewhere_is_the_same_data(write_tokens):
    first = taken(Blend((write_tokens(DOCUMENTS, "a"),)))
    check_fingerprint(first, taken(Blend((write_tokens(DOCUMENTS, "b"),))), allow_changed=False)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda a, b: taken(Blend((a,)), seq_length=5), r"data\.seq_length: 4 there, 5 here"),
        (lambda a, b: taken(Blend((a,)), seed=2), r"train\.seed: 1 there, 2 here"),
        (lambda a, b: taken(Blend((a, b))), "number of sources: 1 there, 2 here"),
        (lambda a, b: taken(Blend((b,))), "tokens of source 1: 24 bytes"),
    ],
)
def test_what_differs_is_named(write_tokens, change, name):
    a, b = write_tokens(DOCUMENTS, "a"), write_tokens([DOCUMENTS[0], [8, 1], DOCUMENTS[2]], "b")
    now = change(a, b)
    with pytest.raises(DataError, match=rf"data\.train: changed since the checkpoint \({name}.*allow_changed=true"):
        check_fingerprint(taken(Blend((a,))), now, allow_changed=False)
    check_fingerprint(taken(Blend((a,))), now, allow_changed=True)
    check_fingerprint({}, now, allow_changed=False)


def test_weights_and_the_ends_of_documents_count(write_tokens):
    a, b = write_tokens(DOCUMENTS, "a"), write_tokens(DOCUMENTS, "b")
    joined = write_tokens([DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2]], "c")
    saved = taken(Blend((a, b), (0.3, 0.7)))
    check_fingerprint(saved, taken(Blend((a, b), (3, 7))), allow_changed=False)
    with pytest.raises(DataError, match=r"weight of source 1: 0.3 there, 0.4 here"):
        check_fingerprint(saved, taken(Blend((a, b), (0.4, 0.6))), allow_changed=False)
    with pytest.raises(DataError, match="index of source 1"):
        check_fingerprint(taken(Blend((a,))), taken(Blend((joined,))), allow_changed=False)


def test_the_ends_and_stretches_of_a_large_file_are_read(tmp_path, write_tokens, monkeypatch):
    monkeypatch.setattr("sparsecod_megatron.data.fingerprint._STRETCH_BYTES", 4)
    prefix = write_tokens([[7] * 2000])
    before = taken(Blend((prefix,)))
    path = tmp_path / "tokens.bin"
    for place in (0, 3996):
        content = bytearray(path.read_bytes())
        content[place] ^= 1
        path.write_bytes(content)
        assert taken(Blend((prefix,)))["tokens of source 1"] != before["tokens of source 1"]
        content[place] ^= 1
        path.write_bytes(content)
    assert taken(Blend((prefix,))) == before
