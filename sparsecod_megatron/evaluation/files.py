"""Writing result files whole or not at all: an interrupted run leaves no half file under its final name."""

from __future__ import annotations

import os
from pathlib import Path

from sparsecod_megatron.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file through a temporary neighbour and a rename; makes the folder.

    Args:
        path: the file's final name; an older file is replaced.
        text: its whole content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(directory: Path) -> None:
    """Refuse an output folder that could not be written, before hours of work rather than after.

    Args:
        directory: the output folder; need not exist yet.

    Raises:
        ConfigError: it, or the nearest folder above it that exists, is no folder or may not be written.
    """
    existing = next(path for path in (directory, *directory.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output {directory}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {directory}: no permission to write in {existing}; give another folder")
