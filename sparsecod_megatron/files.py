"""Output that is refused before any work if it could not be written, and that appears whole or not at all.

What is written lies beside its place, hidden, and is renamed when it is complete: whoever looks finds the old content
or the new, also after the process was killed.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sparsecod_megatron.errors import ConfigError, ConversionError

MODEL_CONFIG_FILE = "config.json"
"""Marks a directory as a HuggingFace model's."""


@contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary neighbour to write, which becomes `path` if the block ends well and is gone if not; makes the folder.

    Args:
        path: the file's final name; its suffix is the neighbour's too, because libraries go by it.
        durable: bring the content to the disk before the rename, so that a power failure leaves no empty file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _neighbour(path)
    try:
        yield temporary
        if durable:
            flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 file as `replacing` does.

    Args:
        path: the file's final name; an older file is replaced.
        text: its whole content, line ends included.
        durable: as `replacing`.
    """
    with replacing(path, durable=durable) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def making(directory: Path) -> Iterator[Path]:
    """A hidden sibling directory that becomes `directory` if the block ends well, and is removed if not.

    Files get the permissions that the umask gives: libraries write weights that their owner alone can read. What an
    earlier process left when it was killed is removed first.

    Args:
        directory: to make; what is there already is replaced, and stays until the new one is in its place.
    """
    new, old = (directory.with_name(f".{directory.name}.{suffix}") for suffix in ("making", "replaced"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
        mode = new.stat().st_mode & 0o666
        for path in new.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
            directory.rename(old)
        new.rename(directory)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def flush(path: Path) -> None:
    """Bring a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_output(path: Path) -> Iterator[Path]:
    """As `replacing`, for the file that a user named by `--output`.

    Raises:
        ConfigError: the system refuses the write (full disk, read-only file system, …).
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror}); give another file") from None


@contextmanager
def making_output(directory: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """As `making`, for the directory that a user named by `--output`.

    Args:
        directory: to make; may exist if it is empty.
        overwrite: replace a model directory that is there.

    Raises:
        ConversionError: the directory is in use.
    """
    directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        raise ConversionError(f"{directory}: is a file; give a directory to make")
    if directory.exists() and any(directory.iterdir()):
        if not overwrite:
            raise ConversionError(f"{directory}: is not empty; give a new directory, or ask to overwrite it")
        if not (directory / MODEL_CONFIG_FILE).is_file():
            raise ConversionError(
                f"{directory}: holds no {MODEL_CONFIG_FILE}, so it is not a model directory to overwrite; "
                "give another one"
            )
    with making(directory) as folder:
        yield folder


def check_output(path: Path, suffixes: Sequence[str] = ()) -> None:
    """Refuse an `--output` file that cannot be written or whose suffix names no known format.

    Args:
        path: the file; it and its folder need not exist yet.
        suffixes: what it may end in, such as `(".html", ".png")`; none allows everything.

    Raises:
        ConfigError: unknown suffix, a folder of that name, or a folder that is a file or may not be written.
    """
    if suffixes and path.suffix not in suffixes:
        raise ConfigError(f"--output {path}: ends in {path.suffix!r}; give a file that ends in {', '.join(suffixes)}")
    if path.is_dir():
        raise ConfigError(f"--output {path}: is a folder; give a file")
    _check_existing(path, path.absolute().parents, "a path in a folder")


def check_writable(directory: Path) -> None:
    """Refuse an `--output` folder that could not be written, before hours of work rather than after.

    Args:
        directory: the output folder; need not exist yet.

    Raises:
        ConfigError: it, or the nearest folder above it that exists, is a file or may not be written.
    """
    _check_existing(directory, (directory, *directory.absolute().parents), "a folder")


def _check_existing(output: Path, places: Sequence[Path], wanted: str) -> None:
    existing = next(place for place in places if place.exists())
    if not existing.is_dir():
        raise ConfigError(f"--output {output}: {existing} is a file; give {wanted}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output {output}: no permission to write in {existing}; give another folder")


def _neighbour(path: Path) -> Path:
    # Not from Python's or torch's generators, whose state belongs to the run.
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
