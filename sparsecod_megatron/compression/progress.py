"""Blocks that are pruned already, kept in files so that a run that was killed continues where it was."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.files import replacing

Outputs = tuple[float, float] | None
"""Squared Frobenius norms of the change of a matrix's outputs and of its old outputs."""


@dataclass(frozen=True)
class DoneBlock:
    """What was made of a block.

    Attributes:
        matrices: by a matrix's key: its new weights `[out, in]`, and the norms of its outputs.
        pooled: keys of matrices pruned by pooled statistics.
        unreached: keys of those that no input reached.
    """

    matrices: dict[str, tuple[Tensor, Outputs]]
    pooled: list[str]
    unreached: list[str]


@dataclass(frozen=True)
class Progress:
    """A file for each block, whole or not at all.

    Attributes:
        folder: for the files of one model, rule and calibration; None keeps nothing.
    """

    folder: Path | None = None

    def has(self, layer: int) -> bool:
        """Whether the block is done."""
        return self.folder is not None and self._file(layer).is_file()

    def save(self, layer: int, block: DoneBlock) -> None:
        """Keep a block."""
        if self.folder is None:
            return
        said = {
            "outputs": {key: outputs for key, (_, outputs) in block.matrices.items()},
            "pooled": block.pooled,
            "unreached": block.unreached,
        }
        tensors = {key: weight.contiguous() for key, (weight, _) in block.matrices.items()}
        with replacing(self._file(layer), durable=True) as temporary:
            save_file(tensors, temporary, metadata={"block": json.dumps(said)})

    def load(self, layer: int) -> DoneBlock:
        """A block that is done.

        Raises:
            CheckpointError: a damaged file.
        """
        path = self._file(layer)
        try:
            with safe_open(path, framework="pt") as file:
                said = json.loads(file.metadata()["block"])
                weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); delete its folder and start again") from error
        outputs = {key: None if pair is None else (pair[0], pair[1]) for key, pair in said["outputs"].items()}
        matrices = {key: (weights[key], outputs[key]) for key in outputs}
        return DoneBlock(matrices, said["pooled"], said["unreached"])

    def _file(self, layer: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block_{layer:04d}.safetensors"
