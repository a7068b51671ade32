"""A tensor inside a checkpoint's file, mapped into memory where it lies instead of being read and copied.

torch saves a tensor as a zip archive: a pickle that says type and shape, and the numbers, neither compressed nor split.
Its own reader copies the numbers twice and sums them up on the way; files are compared with their SHA-256 already.
Source: https://docs.pytorch.org/docs/stable/notes/serialization.html.
"""

from __future__ import annotations

import io
import mmap
import struct
import zipfile
from typing import BinaryIO

import torch
from torch import Tensor

LOCAL_HEADER = struct.Struct("<26xHH")
"""What precedes a member of a zip archive, up to the lengths of its name and of its extra field."""


class _Window(io.RawIOBase):
    """The bytes of a file from `start` on as a file of their own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"offset {base + offset} lies before the start")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(wanted)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


def map_tensor(file: BinaryIO, offset: int, length: int) -> Tensor:
    """The tensor that `torch.save` wrote at `offset`. Local.

    Args:
        file: open for reading; may be closed while the tensor lives.
        offset: first byte of the archive.
        length: bytes of the archive.

    Returns:
        On CPU. Its memory is the file's; writing to it changes the tensor alone.

    Raises:
        ValueError: no tensor, or one whose numbers are not all there.
        BadZipFile: no archive.
        RuntimeError, UnpicklingError: torch cannot read the description.
    """
    archive = io.BufferedReader(_Window(file, offset, length))
    described = torch.load(archive, map_location="meta", weights_only=True)
    if not isinstance(described, Tensor):
        raise ValueError(f"holds a {type(described).__name__}, not a tensor")
    if not described.numel():
        return torch.empty_like(described, device="cpu")
    start, size = _numbers(archive)
    if size != described.untyped_storage().nbytes() or start + size > length:
        raise ValueError(f"{size} bytes at {start} of {length} are not its {described.untyped_storage().nbytes()}")
    # Mappings start at pages.
    before = (offset + start) % mmap.ALLOCATIONGRANULARITY
    mapping = mmap.mmap(file.fileno(), before + size, offset=offset + start - before, access=mmap.ACCESS_COPY)
    numbers = torch.frombuffer(mapping, dtype=described.dtype, count=size // described.dtype.itemsize, offset=before)
    return numbers.as_strided(described.size(), described.stride(), described.storage_offset())


def _numbers(archive: BinaryIO) -> tuple[int, int]:
    """(first byte, bytes) of the one storage in the archive."""
    with zipfile.ZipFile(archive) as members:
        storages = [member for member in members.infolist() if "/data/" in member.filename]
    if len(storages) != 1 or storages[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{len(storages)} storages, or a compressed one")
    member = storages[0]
    archive.seek(member.header_offset)
    name, extra = LOCAL_HEADER.unpack(archive.read(LOCAL_HEADER.size))
    return member.header_offset + LOCAL_HEADER.size + name + extra, member.file_size
