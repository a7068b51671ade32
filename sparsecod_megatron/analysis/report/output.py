"""Where a report goes: refused before any work if it could not be written there, and written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparsecod_megatron.errors import ConfigError


def check_output(path: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse a file that cannot be written or whose suffix names no known format.

    Args:
        path: the file; it and its folder need not exist yet.
        suffixes: what it may end in, e.g. `(".html", ".png")`.

    Raises:
        ConfigError: unknown suffix, a folder of that name, or a folder that is none or may not be written.
    """
    if path.suffix not in suffixes:
        raise ConfigError(f"--output {path}: ends in {path.suffix!r}; give a file that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; give a file")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output {path}: {existing} is a file; give a path in a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {path}: no permission to write in {existing}; give another folder")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour to write, which becomes `path` if the block ends well and is gone if not; makes the folder.

    Raises:
        ConfigError: the system refuses the write (full disk, read-only file system, …).
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror}); give another file") from None
