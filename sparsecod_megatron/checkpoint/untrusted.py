"""Loading a checkpoint runs nothing that is written in it.

torch's reader unpickles `.metadata`, and Megatron-Core's planner unpickles objects inside the shards; a pickle can call
any function. Here `.metadata` may name only the classes that it is made of, and torch.load only restores tensors.
FP8 scales are the one pickle more; `fp8_state.py` reads them before Transformer Engine does.
"""

from __future__ import annotations

import contextlib
import enum
import io
import os
import pickle
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from sparsecod_megatron.checkpoint.paths import METADATA_FILE

_CLASSES_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "bool", "float16", "float32", "float64", "int32", "int64", "uint8"},
    "collections": {"OrderedDict"},
}
"""What torch's and Megatron-Core's writers put into `.metadata`."""


class _Reader(pickle.Unpickler):
    """Refuses, before it is looked up, every name that does not belong into what is read.

    Args:
        content: the pickle.
        classes: names allowed, by module.
        what: is read, for messages.
    """

    def __init__(self, content: bytes, classes: Mapping[str, Set[str]], what: str) -> None:
        super().__init__(io.BytesIO(content))
        self._classes, self._what = classes, what

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enumeration_member
        if name not in self._classes.get(module, ()):
            raise pickle.UnpicklingError(f"{self._what} names {module}.{name}, which does not belong there")
        return super().find_class(module, name)


def _enumeration_member(kind: Any, name: Any) -> enum.Enum:
    """What Python 3.11.0 to 3.11.3 write as `getattr(kind, name)`: a member of an enumeration, and nothing else."""
    if isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__:
        return kind[name]
    raise pickle.UnpicklingError(f"builtins.getattr of {kind!r}, which is not an enumeration with a member {name!r}")


def read_pickle(content: bytes, classes: Mapping[str, Set[str]], what: str) -> Any:
    """Unpickle without calling anything but these classes. Local.

    Args:
        content: the pickle.
        classes: names allowed, by module.
        what: is read, for messages.

    Raises:
        pickle.UnpicklingError: it names something else, or is damaged.
    """
    try:
        return _Reader(content, classes, what).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # any exception: damaged bytes become arguments of the classes
        raise pickle.UnpicklingError(f"{what}: {type(error).__name__}: {error}") from error


def read_metadata(directory: Path) -> Metadata:
    """Read `.metadata` without calling anything but its own classes. Local.

    Raises:
        OSError: it cannot be read.
        pickle.UnpicklingError: it names something else, or is damaged.
    """
    metadata = read_pickle((directory / METADATA_FILE).read_bytes(), _CLASSES_ALLOWED, METADATA_FILE)
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{METADATA_FILE} holds a {type(metadata).__name__}")
    return metadata


@contextlib.contextmanager
def tensors_only() -> Iterator[None]:
    """While the block runs, every torch.load of this process refuses to call functions, even where told to.

    Source: torch.serialization.load; the planner asks for `weights_only=False` (checkpoint/default_planner.py).
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
