"""Tensors mapped from where torch saved them are those that torch's own reader gives; anything else is refused."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import pytest
import torch

from sparsecod_megatron.checkpoint.mapped import map_tensor

BASE = torch.arange(24.0).reshape(4, 6)
TENSORS = {
    "whole": BASE,
    "transposed": BASE.T,
    "slice": BASE[1:3, ::2],
    "bf16": BASE.bfloat16(),
    "int8": torch.arange(7, dtype=torch.int8),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.empty(0, 5),
    "large": torch.arange(3 * 4096, dtype=torch.int64),
}


REFUSALS = (ValueError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError)


def archive(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("before", [0, 1, 4096, 5001])
def test_equals_torchs_reader(tmp_path: Path, name: str, before: int) -> None:
    """Wherever in the file it lies; the tensor outlives the open file, and writing to it leaves the file alone."""
    content = archive(TENSORS[name])
    path = tmp_path / "pieces"
    path.write_bytes(b"x" * before + content + b"y" * 3)
    with path.open("rb") as file:
        found = map_tensor(file, before, len(content))
    expected = torch.load(io.BytesIO(content), weights_only=True)
    assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
    assert torch.equal(found, expected)
    found.zero_()
    assert path.read_bytes()[before:-3] == content


def refused(path: Path, content: bytes, length: int | None = None) -> str:
    path.write_bytes(content)
    with path.open("rb") as file, pytest.raises(REFUSALS) as caught:
        map_tensor(file, 0, len(content) if length is None else length)
    return str(caught.value)


def test_what_is_no_tensor(tmp_path: Path) -> None:
    assert "holds a dict, not a tensor" in refused(tmp_path / "dict", archive({"a": BASE}))
    refused(tmp_path / "bytes", b"nothing like it")
    content = archive(BASE)
    refused(tmp_path / "short", content, len(content) - 30)


@pytest.mark.parametrize(
    ("numbers", "packing", "message"),
    [(40, zipfile.ZIP_STORED, "are not its 96"), (96, zipfile.ZIP_DEFLATED, "1 storages, or a compressed one")],
    ids=["fewer", "packed"],
)
def test_numbers_that_are_not_all_there(tmp_path: Path, numbers: int, packing: int, message: str) -> None:
    """A good directory whose numbers are fewer, or packed."""
    source, changed = zipfile.ZipFile(io.BytesIO(archive(BASE))), io.BytesIO()
    with zipfile.ZipFile(changed, "w") as target:
        for member in source.infolist():
            data = "/data/" in member.filename
            content = source.read(member)[: numbers if data else None]
            target.writestr(member.filename, content, packing if data else zipfile.ZIP_STORED)
    assert message in refused(tmp_path / "archive", changed.getvalue())
