"""A checkpoint of any layout as single-process tensors, read from disk one at a time and never built into a model.

Checkpoints hold what all layouts share: each parameter once, in pieces, with the layers (and experts) of one kind
stacked under one key. This file finds the pieces of one tensor and puts them together.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from zipfile import BadZipFile

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from sparsecod_megatron.checkpoint.manifest import DamagedCheckpoint, require_undamaged
from sparsecod_megatron.checkpoint.mapped import map_tensor
from sparsecod_megatron.checkpoint.paths import resolve_step_dir, tokenizer_dir
from sparsecod_megatron.checkpoint.state import read_state, saved_config
from sparsecod_megatron.checkpoint.untrusted import read_metadata
from sparsecod_megatron.config import RunConfig
from sparsecod_megatron.config.parameters import NORM_RENAMES
from sparsecod_megatron.seams.plugin import STATE_PREFIX

NOT_WEIGHTS = ("optimizer.", STATE_PREFIX)
"""Before the keys of tensors that belong to no model."""
OPTIMIZER_PREFIX = "optimizer.state.{}."
"""Prefix of a parameter's key, for what the optimizer keeps of it."""
EXPERT_STACK, EXPERT = "mlp.experts.experts.", "mlp.experts.local_experts.{}."


@dataclass(frozen=True)
class TensorLocation:
    """Where a tensor lies.

    Attributes:
        key: in the checkpoint.
        index: layer and expert, as far as they are stacked under the key.
    """

    key: str
    index: tuple[int, ...]


@dataclass(frozen=True)
class StreamedCheckpoint:
    """A checkpoint that is open for reading.

    Attributes:
        config: configuration of the run that made it, as it was saved.
        tensors: every parameter (and router bias) under its name in a single-process GPTModel of the local spec; each
            access reads the tensor from disk.
        step_dir: the checkpoint.
        tokenizer_dir: HuggingFace tokenizer of the run, or None if it has none.
    """

    config: RunConfig
    tensors: Mapping[str, Tensor]
    step_dir: Path
    tokenizer_dir: Path | None


@contextmanager
def streamed_checkpoint(path: Path, *, digests: bool = True) -> Iterator[StreamedCheckpoint]:
    """Open a checkpoint while the block runs. Local; needs no process group.

    Args:
        path: a run directory or one of its step directories.
        digests: compare all files with their SHA-256 first; otherwise only presence and sizes.

    Raises:
        CheckpointError: no checkpoint at or under `path`.
        DamagedCheckpoint: not as it was written (also while tensors are read).
    """
    step_dir = resolve_step_dir(path)
    require_undamaged(step_dir, digests=digests)
    read_state(step_dir)
    with ExitStack() as files:
        yield StreamedCheckpoint(
            config=saved_config(step_dir),
            tensors=CheckpointTensors(step_dir, files),
            step_dir=step_dir,
            tokenizer_dir=tokenizer_dir(step_dir),
        )


class CheckpointTensors(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for and kept by nobody.

    Args:
        step_dir: the checkpoint.
        files: closes the files that reading opens.
        kind: kind of the optimizer's tensors (`exp_avg`), under their parameter's names; None: the model's own.

    Attributes:
        places: by name.
    """

    def __init__(self, step_dir: Path, files: ExitStack, kind: str | None = None) -> None:
        self._step_dir, self._files = step_dir, files
        self._open: dict[str, BinaryIO] = {}
        self._metadata = stored_metadata(step_dir)
        self.places = dict(_places(self._metadata, OPTIMIZER_PREFIX.format(kind) if kind else ""))
        self._pieces = self._pieces_by_place()

    def __getitem__(self, name: str) -> Tensor:
        """On CPU, in the type it was saved in.

        Raises:
            DamagedCheckpoint: a piece is absent or damaged.
        """
        place = self.places[name]
        entry = self._metadata.state_dict_metadata[place.key]
        assert isinstance(entry, TensorStorageMetadata), place
        stacked = len(place.index)
        shape = tuple(entry.size)[stacked:]
        pieces = self._pieces.get(place, [])
        # The usual case: one piece per layer and expert, with leading axes of length 1, which stays mapped.
        if len(pieces) == 1:
            return self._read(pieces[0]).reshape(shape)
        whole, filled = torch.empty(shape, dtype=entry.properties.dtype), 0
        for piece in pieces:
            tensor = self._read(piece)[(0,) * stacked]
            assert piece.offset is not None
            where = tuple(
                slice(start, start + size) for start, size in zip(piece.offset[stacked:], tensor.shape, strict=True)
            )
            whole[where] = tensor
            filled += tensor.numel()
        # No element is stored twice, so the sizes of the pieces add up to the whole unless one is absent.
        if filled != whole.numel():
            raise DamagedCheckpoint(f"{self._step_dir}: {place.key} is incomplete; choose another step")
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def _pieces_by_place(self) -> dict[TensorLocation, list[MetadataIndex]]:
        """Pieces of each place; Megatron-Core writes one layer and one expert per piece."""
        depth = {place.key: len(place.index) for place in self.places.values()}
        pieces: dict[TensorLocation, list[MetadataIndex]] = {}
        for index in self._metadata.storage_data:
            # Objects (FP8 scales) have no offset; they are not tensors.
            if index.fqn in depth and index.offset is not None:
                place = TensorLocation(index.fqn, tuple(index.offset[: depth[index.fqn]]))
                pieces.setdefault(place, []).append(index)
        return pieces

    def _read(self, piece: MetadataIndex) -> Tensor:
        stored = self._metadata.storage_data[piece]
        try:
            if stored.relative_path not in self._open:
                file = (self._step_dir / stored.relative_path).open("rb")
                self._open[stored.relative_path] = self._files.enter_context(file)
            return map_tensor(self._open[stored.relative_path], stored.offset, stored.length)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, BadZipFile) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DamagedCheckpoint(
                f"{self._step_dir / stored.relative_path}: {piece.fqn} cannot be read ({reason}); choose another step"
            ) from error


def stored_metadata(step_dir: Path) -> Metadata:
    """Which tensors a checkpoint holds, and where they lie. Local.

    Raises:
        DamagedCheckpoint: that cannot be read.
    """
    try:
        return read_metadata(step_dir)
    except (OSError, pickle.UnpicklingError) as error:
        raise DamagedCheckpoint(
            f"{step_dir}: its index cannot be read ({' '.join(str(error).split())[:200]}); choose another step"
        ) from error


def _places(metadata: Metadata, prefix: str) -> Iterator[tuple[str, TensorLocation]]:
    """Name in the model and place of every weight, or of what lies under a prefix in the optimizer's part."""
    for key, entry in metadata.state_dict_metadata.items():
        others = not key.startswith(prefix) if prefix else key.startswith(NOT_WEIGHTS)
        if others or not isinstance(entry, TensorStorageMetadata):
            continue
        found = re.fullmatch(r"decoder\.layers\.(?:(\d+)\.)?(.+)", key.removeprefix(prefix))
        if found is None:
            yield key.removeprefix(prefix), TensorLocation(key, ())
            continue
        numbered, rest = found.groups()
        # Layers with the same parameters are stacked under one key; where layers differ, each has its own.
        layers = range(entry.size[0]) if numbered is None else [int(numbered)]
        for layer in layers:
            above = (layer,) if numbered is None else ()
            for name, expert in _expert_names(NORM_RENAMES.get(rest, rest), entry, len(above)):
                yield f"decoder.layers.{layer}.{name}", TensorLocation(key, above + expert)


def _expert_names(rest: str, entry: TensorStorageMetadata, axis: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    if not rest.startswith(EXPERT_STACK):
        yield rest, ()
        return
    for expert in range(entry.size[axis]):
        yield EXPERT.format(expert) + rest.removeprefix(EXPERT_STACK), (expert,)
