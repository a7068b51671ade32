"""manifest.json: size and SHA-256 of every other file of a checkpoint.

It is the last file written, so a directory that has it is whole, and everything in it can be compared before it is
read. `sha256sum` gives the same digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

from sparsecod_megatron.checkpoint.first_rank import first_problem
from sparsecod_megatron.checkpoint.paths import METADATA_FILE, STATE_FILE
from sparsecod_megatron.config.run_files import CONFIG_FILE
from sparsecod_megatron.errors import CheckpointError
from sparsecod_megatron.files import flush

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Version of manifest.json; a reader refuses any other."""
FILES_REQUIRED = (STATE_FILE, CONFIG_FILE, COMMON_STATE_FNAME, CONFIG_FNAME, METADATA_FILE)
_BLOCK = 1 << 22


class DamagedCheckpoint(CheckpointError):
    """A checkpoint that is not as it was written; another step of the same run may do."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(directory: Path, digests: Mapping[str, str]) -> None:
    """Flush every file of `directory` to the disk and list it. Local.

    Args:
        directory: complete but for the manifest.
        digests: digests of files that were hashed (and flushed) when they were written.
    """
    files = {}
    for path in sorted(directory.iterdir()):
        if path.name == MANIFEST_FILE:
            continue
        if path.name not in digests:
            flush(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": digests.get(path.name) or file_digest(path)}
    path = directory / MANIFEST_FILE
    path.write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    flush(path)
    flush(directory)


def find_damage(directory: Path, *, digests: bool, share: tuple[int, int] = (0, 1)) -> str | None:
    """The first difference between a checkpoint and its manifest, or None. Local.

    Args:
        directory: a step directory.
        digests: hash the files; otherwise presence and sizes only.
        share: (index, count): hash only every `count`-th file from `index` on.
    """
    index, count = share
    try:
        files = _read_manifest(directory / MANIFEST_FILE)
        for name, entry in files.items():
            if (size := (directory / name).stat().st_size) != entry["size"]:
                return f"{name} has {size} bytes, not {entry['size']}"
        if not digests:
            return None
        for name, entry in list(files.items())[index::count]:
            if file_digest(directory / name) != entry["sha256"]:
                return f"{name} is not what was written: its SHA-256 differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def require_undamaged(directory: Path, *, digests: bool) -> None:
    """Refuse a damaged checkpoint. Local.

    Raises:
        DamagedCheckpoint: a file is missing, incomplete or (with `digests`) not what was written.
    """
    if damage := find_damage(directory, digests=digests):
        raise DamagedCheckpoint(f"{directory}: damaged ({damage}); choose another step")


def check_files(directory: Path, *, digests: bool) -> None:
    """Refuse a damaged checkpoint, on all ranks alike; each hashes a share. Collective over all processes.

    Raises:
        DamagedCheckpoint: a file is missing, incomplete or not what was written.
    """
    share = (dist.get_rank(), dist.get_world_size())
    if damage := first_problem(find_damage(directory, digests=digests, share=share)):
        raise DamagedCheckpoint(f"{directory}: damaged ({damage}); choose another step")


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    content = json.loads(path.read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"{path.name} has format {content['format']}, this version reads {FORMAT}")
    files = content["files"]
    for name in (*FILES_REQUIRED, *files):
        if name not in files or name != Path(name).name:
            raise ValueError(f"{path.name} does not list {name}")
    return files
