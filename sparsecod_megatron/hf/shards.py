"""Weights as sharded safetensors: planned from shapes, written tensor by tensor, the same bytes for the same tensors.

The safetensors library's own writer takes a file's tensors all at once; this one holds one tensor at a time. The format
is a length, a JSON header and the tensors' bytes: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparsecod_megatron.hf.transforms import Shape

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int32: "I32",
}
HEADER_ALIGNMENT = 8
"""Bytes; the header is padded with blanks, so that the tensors after it are aligned."""


def plan_shards(
    shapes: Mapping[str, Shape], *, dtype: torch.dtype, max_shard_bytes: int, integers: Collection[str] = ()
) -> list[dict[str, Shape]]:
    """Cut the tensors, in their order, into files.

    Args:
        shapes: name to shape.
        dtype: number format of every tensor in the files.
        max_shard_bytes: largest sum of tensor bytes in a file; a tensor above it gets its own.
        integers: names of those that are int32 instead.

    Returns:
        Names and shapes of each file.
    """
    shards: list[dict[str, Shape]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * _stored_as(name, dtype, integers).itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards


def write_shards(
    tensors: Iterable[tuple[str, Tensor]],
    shards: Sequence[Mapping[str, Shape]],
    *,
    dtype: torch.dtype,
    folder: Path,
    integers: Collection[str] = (),
) -> None:
    """Write the files, holding one tensor in memory at a time, and the index if there are several.

    Args:
        tensors: names and tensors in the plan's order, any device and floating-point type.
        shards: from `plan_shards`.
        dtype: to store.
        folder: an existing directory.
        integers: as `plan_shards`.
    """
    source = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        filename = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / filename).open("wb") as file:
            file.write(_header(shapes, dtype, integers))
            for expected, shape in shapes.items():
                name, tensor = next(source)
                assert (name, tuple(tensor.shape)) == (expected, shape), f"{name} came where {expected} was planned"
                stored = tensor.detach().to(device="cpu", dtype=_stored_as(name, dtype, integers)).contiguous()
                file.write(stored.flatten().view(torch.uint8).numpy().data)
                # Not kept while the next one is read.
                del tensor, stored
        weight_map |= dict.fromkeys(shapes, filename)
    assert next(source, None) is None, "more tensors than planned"
    if len(shards) > 1:
        size = sum(
            math.prod(shape) * _stored_as(name, dtype, integers).itemsize
            for shapes in shards
            for name, shape in shapes.items()
        )
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _stored_as(name: str, dtype: torch.dtype, integers: Collection[str]) -> torch.dtype:
    return torch.int32 if name in integers else dtype


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype, integers: Collection[str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        stored_as = _stored_as(name, dtype, integers)
        size = math.prod(shape) * stored_as.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[stored_as], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
