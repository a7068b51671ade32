"""Tensors that are put away in order and taken one at a time: in memory, or in a file that nobody else sees."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


class Shelf(Protocol):
    """What a list of tensors does, and `OnDisk`."""

    def __getitem__(self, place: int, /) -> Tensor:
        """One of them, on the CPU."""

    def __setitem__(self, place: int, tensor: Tensor, /) -> None:
        """Put another in its place."""

    def append(self, tensor: Tensor, /) -> None:
        """Put one behind the others."""


class OnDisk:
    """Tensors in a file without a name, which is gone when the process ends, however it ends.

    Args:
        folder: on the disk that is to hold it; made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  (open as long as this object lives)
        self._places: list[tuple[int, torch.Size, torch.dtype]] = []

    def __getitem__(self, place: int) -> Tensor:
        """One of them, on the CPU; a new tensor each time."""
        start, shape, dtype = self._places[place]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        count = self._file.readinto(_bytes(tensor))
        assert count == tensor.nbytes, "the file holds what was put there"
        return tensor

    def __setitem__(self, place: int, tensor: Tensor) -> None:
        """Put another of the same shape and type in its place."""
        start, shape, dtype = self._places[place]
        assert (tensor.shape, tensor.dtype) == (shape, dtype), f"{tensor.shape} of {tensor.dtype} for {shape} {dtype}"
        self._write(start, tensor)

    def append(self, tensor: Tensor) -> None:
        """Put one behind the others."""
        start = self._file.seek(0, os.SEEK_END)
        self._places.append((start, tensor.shape, tensor.dtype))
        self._write(start, tensor)

    def _write(self, start: int, tensor: Tensor) -> None:
        self._file.seek(start)
        self._file.write(_bytes(tensor.detach().cpu().contiguous()))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
