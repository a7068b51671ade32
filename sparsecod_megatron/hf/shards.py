"""Weights as sharded safetensors: planned from shapes, written in one pass, the same bytes for the same tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsecod_megatron.hf.transforms import Shape


def plan_shards(shapes: Mapping[str, Shape], *, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Cut the tensors, in their order, into files.

    Args:
        shapes: name to shape.
        dtype: of every tensor in the files.
        max_shard_bytes: largest sum of tensor bytes in a file; a tensor above it gets its own.

    Returns:
        Names of each file.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], shards: Sequence[Sequence[str]], *, dtype: torch.dtype, folder: Path
) -> None:
    """Write the files, holding one of them in memory at a time, and the index if there are several.

    Args:
        tensors: names and tensors in the plan's order, any device and floating-point type.
        shards: from `plan_shards`.
        dtype: to store.
        folder: an existing directory.
    """
    source = iter(tensors)
    sizes = 0
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        held: dict[str, Tensor] = {}
        for expected in names:
            name, tensor = next(source)
            assert name == expected, f"{name} came where {expected} was planned"
            held[name] = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
            sizes += held[name].nbytes
        filename = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(held, folder / filename, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, filename)
    assert next(source, None) is None, "more tensors than planned"
    if len(shards) > 1:
        index = {"metadata": {"total_size": sizes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
