"""Every file below a directory, and what was passed over: nothing of a folder is left out silently."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from sparsecod_megatron.errors import DataError


@dataclass
class Found:
    """Files below a directory.

    Attributes:
        files: ordered by their path below it.
        passed_over: paths below it that are hidden, no files, links to nothing, or folders that are read already
            under another name; folders end in a slash.
    """

    files: list[Path] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


def find_files(directory: Path) -> Found:
    """Walk a directory; links to folders are followed, and each folder is read once, under its own name if it can be.

    Raises:
        DataError: a folder that cannot be read.
    """
    found = Found()
    walked: set[str] = set()
    pending = [directory]
    while pending:  # links last
        for name, folders, files in os.walk(pending.pop(0), onerror=_refuse):
            folder = Path(name)
            real = os.path.realpath(folder)
            if real in walked:
                found.passed_over.append(f"{_relative(folder, directory)}/")
                folders.clear()
                continue
            walked.add(real)
            links = [path for path in sorted(folders) if (folder / path).is_symlink()]
            hidden = [path for path in folders if path.startswith(".")]
            pending += [folder / path for path in links if path not in hidden]
            found.passed_over += [f"{_relative(folder / path, directory)}/" for path in hidden]
            folders[:] = sorted(set(folders) - set(links) - set(hidden))
            for path in (folder / file for file in files):
                if path.name.startswith(".") or not path.is_file():
                    found.passed_over.append(_relative(path, directory))
                else:
                    found.files.append(path)
    found.files.sort(key=lambda path: _relative(path, directory))
    return found


def _relative(path: Path, directory: Path) -> str:
    return path.relative_to(directory).as_posix()


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read ({error.strerror}); check the folder") from error
